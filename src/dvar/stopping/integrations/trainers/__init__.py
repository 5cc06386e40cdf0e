"""Adapters of trainers with a program of their own: each is judged by the held loss that it computes already."""
