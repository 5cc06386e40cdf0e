"""Animals, one of them a toy: cat, dog, duck, fish, bird, owl, teddy, snail."""

from __future__ import annotations

import math

from dvar.mini.world.canvas import (
    Look,
    Pen,
    box,
    curve,
    darker,
    lighter,
    oval,
    polygon,
    turned,
    union,
)
from dvar.mini.world.classes import thing

INK = (0.09, 0.07, 0.10)
CREAM = (0.97, 0.93, 0.85)
ROSE = (0.93, 0.45, 0.50)
BEAK = (0.98, 0.68, 0.15)


@thing(
    "cat",
    accent="ears",
    shape="slim|fat, small|big head, short|long ears, high|low tail, thin|thick tail, tall|short",
)
def draw_cat(pen: Pen, look: Look) -> None:
    hips, head, ear = look.between(0, 0.44, 0.7), look.between(1, 0.38, 0.52), look.between(2, 0.14, 0.46)
    tail, thick, y = look.between(3, -0.6, 0.35), look.between(4, 0.13, 0.26), look.between(5, -0.52, -0.2)
    bend, chin = (hips + 0.28, (tail + 0.8) / 2), y + head * 0.8
    pen.tube(curve((0.2, 0.86), (hips + 0.2, 0.78), bend, (hips + 0.12, tail)), look.main, thick)
    pen.line(curve((hips + 0.19, tail + 0.18), (hips + 0.12, tail)), look.accent, thick)
    pen.body(turned([(0.24, y), (hips * 0.72, 0.3), (hips, 0.72), (hips * 0.85, 1)]), look)
    pen.part(box(-0.36, chin - 0.1, 0.36, chin + 0.2, 0.1), look.accent)
    for side in (-1, 1):
        pen.part(oval(side * 0.2, 0.93, 0.17, 0.09), lighter(look.main, 0.3))
        tip, top = side * head * 0.92, y - head * 0.65 - ear
        pen.part(polygon((side * head * 1.02, y), (tip, top), (side * 0.08, y - head * 0.78)), look.main)
        pen.fill(polygon((tip * 0.95, y - 0.18), (tip * 0.95, top + 0.14), (side * 0.2, y - head * 0.7)), look.accent)
    pen.part(oval(0, y, head * 1.08, head * 0.88), look.main)
    pen.fill(oval(0, y + head * 0.42, head * 0.5, head * 0.36), CREAM)
    for side in (-1, 1):
        pen.eye(side * head * 0.48, y - head * 0.12, 0.14)
        pen.line(polygon((side * head * 0.6, y + head * 0.4), (side * (head + 0.25), y + head * 0.3)), CREAM, 0.035)
        pen.line(curve((0, y + head * 0.42), (side * 0.08, y + head * 0.58), (side * 0.18, y + head * 0.5)), INK, 0.04)
    pen.fill(polygon((-0.09, y + head * 0.2), (0.09, y + head * 0.2), (0, y + head * 0.42)), ROSE)


@thing(
    "dog",
    accent="ears",
    shape="short|long legs, slim|fat, small|big head, short|long snout, short|long ears, high|low tail",
)
def draw_dog(pen: Pen, look: Look) -> None:
    leg, thick, head = look.between(0, 0.26, 0.58), look.between(1, 0.26, 0.4), look.between(2, 0.32, 0.44)
    snout, ear, tail = look.between(3, 0.22, 0.44), look.between(4, 0.35, 0.75), look.between(5, -0.75, 0.1)
    back = 1 - leg - 2 * thick
    x, y, tip = -0.4, back - head * 0.7, -0.4 - head - snout * 0.75
    pen.tube(curve((0.66, back + 0.2), (0.86, (back + tail) / 2), (0.84, tail + back * 0.4)), look.main, 0.14)
    for foot in (-0.28, 0.26):
        pen.part(box(foot, 0.9 - leg, foot + 0.22, 0.98, 0.08), darker(look.main, 0.3))
    trunk = box(-0.58, back, 0.8, 1 - leg, thick)
    pen.body(union(trunk, box(-0.56, 0.7 - leg, -0.32, 1, 0.09), box(0.54, 0.7 - leg, 0.78, 1, 0.09)), look)
    pen.part(union(oval(x, y, head, head), box(tip, y - 0.06, x, y + head * 0.85, 0.17)), look.main)
    pen.part(box(tip + 0.14, y + 0.26, tip + 0.34, y + 0.54, 0.1), ROSE, 0.03)
    pen.line(curve((tip + 0.08, y + 0.22), (tip + 0.25, y + 0.3), (x - 0.1, y + 0.2)), darker(look.main, 0.8), 0.045)
    pen.bead(tip + 0.06, y - 0.02, 0.13)
    pen.eye(x - head * 0.3, y - head * 0.3, 0.13)
    top, low, nape = y - head * 0.8, y - head * 0.7 + ear, x + head
    pen.part(curve((x + 0.05, top), (nape, top + 0.08), (nape + 0.04, low), (x + 0.18, low), closed=True), look.accent)


@thing(
    "duck",
    accent="wing",
    shape="slim|fat, small|big head, short|long neck, short|long bill, low|high tail, small|big wing",
)
def draw_duck(pen: Pen, look: Look) -> None:
    deep, head, neck = look.between(0, 0.36, 0.54), look.between(1, 0.28, 0.4), look.between(2, 0.1, 0.75)
    bill, tail, wing = look.between(3, 0.22, 0.48), look.between(4, 0.0, 0.65), look.between(5, 0.28, 0.5)
    y = 0.86 - deep
    x, top = -0.34, y - deep - neck * 0.5 - head * 0.4
    for foot in (-0.12, 0.2):
        pen.part(polygon((foot, 0.76), (foot + 0.1, 0.9), (foot + 0.12, 1), (foot - 0.26, 1)), BEAK)
    back = [(-0.72, y - 0.1), (-0.3, y - deep * 0.7), (0.4, y - deep * 0.6), (0.95, y - deep * 0.5 - tail)]
    hull = curve(*back, (0.8, y + deep * 0.4), (0.3, y + deep), (-0.4, y + deep * 0.9), closed=True)
    pen.body(union(hull, box(x - 0.2, top, x + 0.22, y + 0.1, 0.15)), look)
    low, end = y + wing * 0.5, x - head - bill
    feathers = [(-0.2, y), (0.2, y - wing * 0.6), (0.3 + wing, y - 0.18), (0.2 + wing * 0.6, low), (0.05, low)]
    pen.part(curve(*feathers, closed=True), look.accent)
    pen.part(curve((x, top - 0.1), (end, top + 0.02), (end, top + 0.2), (x, top + 0.28), closed=True), BEAK)
    pen.part(oval(x, top, head, head), look.main)
    pen.part(box(x - 0.24, top + head * 0.85, x + 0.26, top + head * 0.85 + 0.15, 0.07), look.accent)
    pen.line(polygon((end + 0.04, top + 0.12), (x - head * 0.85, top + 0.13)), darker(BEAK, 0.5), 0.04)
    pen.eye(x - head * 0.25, top - head * 0.2, 0.13)


@thing(
    "fish",
    accent="fins",
    shape="slim|fat, short|long, small|big tail, small|big fins, flat|forked tail, small|big eyes",
)
def draw_fish(pen: Pen, look: Look) -> None:
    deep, length, tail = look.between(0, 0.4, 0.72), look.between(1, 0.5, 0.74), look.between(2, 0.35, 0.75)
    fin, notch, eye = look.between(3, 0.1, 0.42), look.between(4, 0.0, 0.28), look.between(5, 0.12, 0.26)
    x, y = -0.25, 0.97 - max(deep + fin * 0.7, tail)
    end, low = x + length, deep * 0.45
    pen.part(polygon((end - 0.12, y), (0.98, y - tail), (0.98 - notch, y), (0.98, y + tail)), look.accent)
    sail = [(x - 0.25, y - deep * 0.7), (x, y - deep - fin), (x + 0.35, y - deep - fin * 0.8), (end - 0.15, y - 0.2)]
    pen.part(curve(*sail, closed=True), look.accent)
    pen.part(polygon((x, y + deep * 0.8), (x + 0.4, y + deep + fin * 0.7), (x + 0.4, y + deep * 0.5)), look.accent)
    back = [(x - length * 0.6, y - deep * 0.75), (x, y - deep), (end - 0.2, y - low), (end + 0.05, y - 0.1)]
    belly = [(end + 0.05, y + 0.1), (end - 0.2, y + low), (x, y + deep), (x - length * 0.6, y + deep * 0.75)]
    pen.body(curve((x - length, y + 0.05), *back, *belly, closed=True), look)
    pen.line(curve((x - 0.12, y - deep * 0.7), (x, y), (x - 0.12, y + deep * 0.7)), darker(look.main, 0.6), 0.05)
    side = curve((x + 0.06, y + 0.1), (x + 0.36, y - 0.04), (x + 0.4, y + 0.26), (x + 0.18, y + 0.26), closed=True)
    pen.part(side, look.accent)
    pen.eye(x - length * 0.5, y - deep * 0.2, eye)
    pen.line(curve((x - length * 0.9, y + 0.16), (x - length * 0.75, y + 0.26), (x - length / 2, y + 0.2)), INK, 0.05)


@thing(
    "bird",
    accent="wing",
    shape="slim|fat, small|big head, short|long beak, high|low tail, short|long legs, short|long crest",
)
def draw_bird(pen: Pen, look: Look) -> None:
    plump, head, beak = look.between(0, 0.36, 0.52), look.between(1, 0.28, 0.4), look.between(2, 0.14, 0.48)
    tail, leg, crest = look.between(3, -0.5, 0.25), look.between(4, 0.18, 0.42), look.between(5, 0.0, 0.42)
    y = 0.98 - leg - plump
    x, top = -0.3, y - plump * 0.75 - head * 0.4
    for foot in (-0.1, 0.16):
        pen.line(polygon((foot, y), (foot, 0.97), (foot - 0.16, 0.97), (foot + 0.1, 0.97)), darker(BEAK, 0.35), 0.075)
    pen.part(polygon((0.3, y - 0.1), (0.94, y + tail - 0.12), (0.98, y + tail + 0.14), (0.3, y + 0.2)), look.accent)
    for lean in (0.0, 0.16):
        tip = (x + 0.1 + lean * 2, top - head * 0.8 - crest)
        pen.part(polygon((x - 0.12 + lean, top - head * 0.7), tip, (x + 0.16 + lean, top - head * 0.5)), look.accent)
    pen.part(polygon((x - head * 0.8, top - 0.13), (x - head - beak, top + 0.05), (x - head * 0.8, top + 0.2)), BEAK)
    breast = [(x - head * 0.9, top + 0.1), (-0.45, y + plump * 0.4), (0.0, y + plump), (0.4, y + plump * 0.5)]
    belly = curve(*breast, (0.55, y), (0.1, y - plump * 0.7), (x + head * 0.7, top), closed=True)
    pen.body(union(belly, oval(x, top, head, head)), look)
    wing = [(-0.2, y - 0.1), (0.05, y - plump * 0.6), (0.4, y - 0.08), (0.75, y + 0.12), (0.3, y + plump * 0.5)]
    pen.part(curve(*wing, (-0.08, y + plump * 0.4), closed=True), look.accent)
    pen.eye(x - head * 0.25, top - head * 0.1, 0.14)


@thing(
    "owl",
    accent="wings",
    shape="slim|fat, tall|short, small|big eyes, short|long tufts, short|long wings, short|long beak",
)
def draw_owl(pen: Pen, look: Look) -> None:
    wide, top, eye = look.between(0, 0.5, 0.78), look.between(1, -0.86, -0.45), look.between(2, 0.22, 0.34)
    tuft, wing, beak = look.between(3, 0.0, 0.36), look.between(4, 0.38, 0.74), look.between(5, 0.1, 0.42)
    y = top + 0.42
    for side in (-1, 1):
        pen.part(oval(side * 0.24, 0.93, 0.2, 0.07), BEAK)
        horn = polygon((side * wide * 0.95, top + 0.3), (side * wide * 0.95, top - tuft), (side * 0.12, top + 0.08))
        pen.part(horn, look.main)
    crown = [(0, top), (wide * 0.75, top + 0.1), (wide * 0.95, y)]
    pen.body(turned([*crown, (wide, 0.35), (wide * 0.7, 0.8), (0.1, 0.95)]), look)
    for side in (-1, 1):
        shoulder, bend = (side * wide * 0.85, y + 0.2), (side * (wide + 0.16), y + 0.45)
        tip, inner = (side * (wide + 0.08), y + 0.25 + wing), (side * wide * 0.62, y + 0.15 + wing * 0.7)
        pen.part(curve(shoulder, bend, tip, inner, closed=True), look.accent)
        pen.part(oval(side * eye * 0.98, y, eye * 1.12, eye * 1.12), look.accent)
        pen.eye(side * eye * 0.92, y, eye * 0.82)
    root, low = 0.08 + beak * 0.3, y + eye * 0.4
    pen.part(polygon((-root, low), (root, low), (0, y + eye * 0.6 + beak)), BEAK)


@thing(
    "teddy",
    accent="bow",
    shape="small|big head, small|big ears, slim|fat, high|low arms, small|big feet, tall|short",
)
def draw_teddy(pen: Pen, look: Look) -> None:
    head, ear, belly = look.between(0, 0.42, 0.56), look.between(1, 0.16, 0.27), look.between(2, 0.4, 0.58)
    arm, foot, y = look.between(3, -0.1, 0.6), look.between(4, 0.2, 0.31), look.between(5, -0.5, -0.26)
    for side in (-1, 1):
        pen.part(oval(side * head * 0.85, y - head * 0.65, ear, ear), look.main)
        pen.fill(oval(side * head * 0.85, y - head * 0.65, ear * 0.6, ear * 0.6), look.accent)
        elbow, paw = (side * (belly + 0.12), 0.2 + arm * 0.3), (side * (belly + 0.24), arm)
        pen.tube(curve((side * belly * 0.7, 0.2), elbow, paw), look.main, 0.24)
    pen.body(oval(0, 0.48, belly, 0.48), look)
    for side in (-1, 1):
        x = side * (belly * 0.75 + 0.04)
        pen.part(oval(x, 0.97 - foot, foot, foot), look.main)
        pen.fill(oval(x, 0.97 - foot, foot * 0.6, foot * 0.6), look.accent)
    pen.part(oval(0, y, head, head * 0.9), look.main)
    pen.part(oval(0, y + head * 0.38, head * 0.52, head * 0.4), CREAM, 0.03)
    pen.bead(0, y + head * 0.2, 0.11)
    pen.line(curve((-0.16, y + head * 0.5), (0, y + head * 0.62), (0.16, y + head * 0.5)), INK, 0.05)
    for side in (-1, 1):
        pen.eye(side * head * 0.45, y - head * 0.2, 0.11)
        pen.part(polygon((0, y + head), (side * 0.32, y + head - 0.15), (side * 0.32, y + head + 0.15)), look.accent)


@thing(
    "snail",
    accent="body",
    shape="small|big shell, flat|tall shell, small|big head, short|long stalks, loose|tight spiral, high|low head",
)
def draw_snail(pen: Pen, look: Look) -> None:
    shell, tall, head = look.between(0, 0.5, 0.72), look.between(1, 0.85, 1.15), look.between(2, 0.18, 0.28)
    stalk, turns, neck = look.between(3, 0.25, 0.6), look.between(4, 1.2, 2.4), look.between(5, -0.05, 0.35)
    x, y = 0.25, 0.84 - shell * tall
    foot = curve((-0.72, 0.7), (-0.4, 0.6), (0.2, 0.7), (0.6, 0.76), (0.98, 0.98), (0.1, 1), (-0.7, 0.98), closed=True)
    throat = box(-0.66 - head * 0.75, neck, -0.66 + head, 1, 0.1)
    for lean in (-0.16, 0.12):
        pen.tube(curve((-0.66, neck), (-0.66 + lean, neck - head - stalk)), look.accent, 0.09)
    pen.part(union(foot, oval(-0.66, neck, head, head), throat), look.accent)
    pen.body(oval(x, y, shell, shell * tall), look)
    steps = [(0.8 * shell * i / 30, 2 * math.pi * turns * i / 30) for i in range(31)]
    spiral = [(x + radius * math.cos(angle), y + radius * tall * math.sin(angle)) for radius, angle in steps]
    pen.line(curve(*spiral), darker(look.main, 0.65), 0.075)
    for lean in (-0.16, 0.12):
        pen.eye(-0.66 + lean, neck - head - stalk, 0.13)
    pen.line(curve((-0.66 - head * 0.6, neck + 0.06), (-0.7, neck + 0.15), (-0.6, neck + 0.1)), INK, 0.05)
