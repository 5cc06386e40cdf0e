"""Many runs: jobs from a file or a folder, trained by the workers of a pool."""
