"""Things of the house: vase, mug, teapot, bottle, lamp, clock, chair, backpack."""

from __future__ import annotations

import math

from dvar.mini.world.canvas import Look, Pen, box, curve, darker, lighter, oval, polygon, turned, union
from dvar.mini.world.classes import thing


@thing(
    "vase",
    accent="rim",
    shape="slim|fat belly, narrow|wide neck, narrow|wide foot, short|tall, high|low belly, small|big lip",
)
def draw_vase(pen: Pen, look: Look) -> None:
    belly, neck, foot = look.between(0, 0.42, 0.8), look.between(1, 0.16, 0.42), look.between(2, 0.28, 0.5)
    height, swell = look.between(3, 1.5, 1.95), look.between(4, 0.35, 0.68)
    top = 1 - height
    lip = neck + look.between(5, 0.02, 0.2)
    profile = [
        (lip, top),
        (neck, top + 0.18 * height),
        (belly, top + swell * height),
        (foot, 1 - 0.04),
        (foot * 0.9, 1),
    ]
    pen.body(turned(profile), look)
    pen.part(oval(0, top, lip, 0.09), look.accent)
    pen.fill(oval(0, top + 0.01, lip * 0.75, 0.05), darker(look.accent, 0.7))


@thing(
    "mug",
    accent="handle",
    shape="narrow|wide, short|tall, narrow|wide bottom, small|big handle, high|low handle, thin|thick handle",
)
def draw_mug(pen: Pen, look: Look) -> None:
    width, height = look.between(0, 0.5, 0.78), look.between(1, 1.0, 1.7)
    taper, ring = look.between(2, -0.14, 0.1), look.between(3, 0.26, 0.46)
    top = 1 - height
    middle = top + height * look.between(4, 0.42, 0.58)
    left = -0.18
    handle = curve(
        (left + width * 0.9, middle - ring),
        (left + width + ring * 0.95, middle - ring * 0.6),
        (left + width + ring * 0.95, middle + ring * 0.6),
        (left + width * 0.9, middle + ring),
    )
    pen.tube(handle, look.accent, look.between(5, 0.13, 0.24))
    sides = turned([(width, top), (width + taper / 2, (top + 1) / 2), (width + taper, 0.93), (width + taper - 0.08, 1)])
    sides.offset(left, 0)
    pen.body(sides, look)
    pen.part(oval(left, top, width, 0.14), look.main)
    pen.fill(oval(left, top + 0.02, width * 0.84, 0.09), darker(look.main, 0.65))


@thing(
    "teapot",
    accent="lid",
    shape="narrow|wide, short|tall, high|low belly, low|high spout, small|big handle, small|big knob",
)
def draw_teapot(pen: Pen, look: Look) -> None:
    width, height = look.between(0, 0.48, 0.64), look.between(1, 1.0, 1.5)
    swell, spout = look.between(2, 0.36, 0.78), look.between(3, -0.05, 0.35)
    ring, knob = look.between(4, 0.26, 0.44), look.between(5, 0.08, 0.2)
    top, middle = 1 - height, 1 - height * 0.5
    high, low = middle - ring, middle + ring
    handle = curve((0.4, high), (0.78, high), (0.9, middle), (0.72, low), (0.4, low))
    pen.tube(handle, look.accent, 0.14)
    tip = top + 0.12 - spout
    pen.part(
        curve(
            (-0.3, 0.86),
            (-0.7, 0.62),
            (-0.84, tip + 0.3),
            (-0.99, tip),
            (-0.76, tip - 0.04),
            (-0.62, tip + 0.26),
            (-0.3, middle),
            closed=True,
        ),
        look.main,
    )
    sides = [(width * 0.5, top), (width * 0.74, top + 0.16 * height), (width, top + swell * height)]
    pen.body(turned([*sides, (width * 0.72, 0.95), (width * 0.6, 1)]), look)
    pen.part(oval(0, top - 0.12, knob, knob), look.accent)
    pen.part(turned([(0.05, top - 0.1), (width * 0.45, top - 0.04), (width * 0.62, top + 0.1)]), look.accent)


@thing(
    "bottle",
    accent="label",
    shape="narrow|wide, thin|thick neck, high|low shoulder, short|long shoulder, small|big cap, small|big label",
)
def draw_bottle(pen: Pen, look: Look) -> None:
    width, neck = look.between(0, 0.36, 0.6), look.between(1, 0.13, 0.24)
    shoulder, slope = look.between(2, -0.35, 0.15), look.between(3, 0.12, 0.5)
    cap, label = look.between(4, 0.14, 0.34), look.between(5, 0.16, 0.34)
    top = -0.97
    pen.part(box(-neck * 0.85, top, neck * 0.85, top + cap + 0.1, 0.04), look.accent)
    profile = [(neck, top + cap + 0.08), (neck, shoulder - slope), (width, shoulder), (width, 0.9), (width - 0.1, 1)]
    pen.body(turned(profile), look)
    pen.part(box(-neck - 0.06, top + cap, neck + 0.06, top + cap + 0.13, 0.05), look.main)
    middle = (shoulder + 0.95) / 2 + 0.05
    pen.part(box(-width, middle - label, width, middle + label), look.accent)
    pen.fill(oval(0, middle, label * 0.55, label * 0.55), lighter(look.accent, 0.75))


@thing(
    "lamp",
    accent="foot",
    shape="narrow|wide shade, narrow|wide top, short|long shade, thin|fat stem, small|big foot, high|low belly",
)
def draw_lamp(pen: Pen, look: Look) -> None:
    rim, crown = look.between(0, 0.62, 0.92), look.between(1, 0.22, 0.56)
    hem, belly = look.between(2, -0.2, 0.2), look.between(3, 0.1, 0.4)
    foot, bulge = look.between(4, 0.3, 0.66), look.between(5, 0.25, 0.75)
    low = hem + bulge * (0.85 - hem)
    pen.line(curve((rim * 0.6, hem), (rim * 0.6, hem + 0.3)), darker(look.accent, 0.5), 0.05)
    pen.part(oval(rim * 0.6, hem + 0.34, 0.07, 0.07), look.accent)
    pen.part(turned([(0.1, hem - 0.1), (0.1, hem + 0.08), (belly, low), (0.09, 0.9), (0.09, 0.95)]), look.accent)
    pen.part(box(-foot, 0.84, foot, 1, 0.07), look.accent)
    pen.part(oval(0, hem, rim, 0.1), (1.0, 0.93, 0.62))
    pen.body(polygon((-crown, -0.97), (crown, -0.97), (rim, hem), (-rim, hem)), look)


@thing(
    "clock",
    accent="bells",
    shape="narrow|wide, short|tall, square|round corners, small|big face, small|big bells, high|low hand",
)
def draw_clock(pen: Pen, look: Look) -> None:
    width, height = look.between(0, 0.68, 0.95), look.between(1, 0.66, 0.8)
    corner, face = look.between(2, 0.15, 0.9), look.between(3, 0.62, 0.84) * min(width, height)
    bell, hour = look.between(4, 0.2, 0.34), look.between(5, 0.3, 2.2)
    middle = 0.9 - height
    for side in (-1, 1):
        pen.tube(polygon((side * width * 0.5, 0.7), (side * width * 0.75, 0.93)), look.accent, 0.12)
        pen.part(oval(side * width * 0.55, middle - height, bell, bell), look.accent)
    pen.body(box(-width, middle - height, width, middle + height, corner * min(width, height)), look)
    pen.part(oval(0, middle, face, face), (0.98, 0.96, 0.88), shade=0.1)
    for quarter in range(4):
        x, y = math.sin(quarter * math.pi / 2), math.cos(quarter * math.pi / 2)
        pen.fill(oval(x * face * 0.8, middle + y * face * 0.8, 0.05, 0.05), (0.1, 0.1, 0.13))
    pen.line(polygon((0, middle), (-face * 0.3, middle - face * 0.6)), (0.1, 0.1, 0.13), 0.08)
    tip = (face * 0.45 * math.sin(hour), middle - face * 0.45 * math.cos(hour))
    pen.line(polygon((0, middle), tip), (0.1, 0.1, 0.13), 0.11)


@thing(
    "chair",
    accent="legs",
    shape="narrow|wide, low|high back, narrow|wide top, flat|round top, thin|thick legs, straight|splayed legs",
)
def draw_chair(pen: Pen, look: Look) -> None:
    width, back = look.between(0, 0.4, 0.64), look.between(1, 0.62, 0.93)
    flare, round_top = look.between(2, -0.12, 0.14), look.between(3, 0.0, 0.3)
    leg, splay = look.between(4, 0.08, 0.2), look.between(5, 0.0, 0.2)
    seat = 0.06
    top = seat - back - 0.12
    for side in (-1, 1):
        rear = polygon((side * width * 0.65, seat), (side * (width * 0.65 + splay * 0.5), 0.76))
        pen.tube(rear, darker(look.accent), leg * 0.8)
        front = polygon((side * (width + 0.06), seat + 0.2), (side * (width + splay), 0.94 - leg / 2))
        pen.tube(front, look.accent, leg)
    corner = width + flare
    ears = top + round_top
    pen.body(curve((-width, seat), (-corner, ears), (0, top), (corner, ears), (width, seat), closed=True), look)
    edge = seat + 0.24
    pen.part(polygon((-width, seat - 0.1), (width, seat - 0.1), (width + 0.2, edge), (-width - 0.2, edge)), look.main)
    pen.part(box(-width - 0.22, seat + 0.18, width + 0.22, seat + 0.34, 0.06), look.accent)


@thing(
    "backpack",
    accent="pocket",
    shape="narrow|wide, tall|short, square|round top, small|big pocket, narrow|wide sides, small|big loop",
)
def draw_backpack(pen: Pen, look: Look) -> None:
    width, top = look.between(0, 0.54, 0.76), look.between(1, -0.84, -0.5)
    shoulder, pocket = look.between(2, 0.12, 0.6), look.between(3, 0.28, 0.5)
    side_pocket, loop = look.between(4, 0.08, 0.24), look.between(5, 0.12, 0.26)
    pen.tube(curve((-loop, top + 0.1), (-loop, top - 0.12), (loop, top - 0.12), (loop, top + 0.1)), look.accent, 0.09)
    for side in (-1, 1):
        middle = side * width
        pen.part(box(middle - side_pocket, 0.3, middle + side_pocket, 0.92, 0.1), darker(look.main, 0.3))
    pen.body(union(box(-width, top, width, 0.6, shoulder), box(-width, 0.2, width, 1, 0.18)), look)
    flap = top + 0.62
    pen.line(curve((-width, flap - 0.14), (0, flap), (width, flap - 0.14)), darker(look.main, 0.6), 0.07)
    pen.part(box(-width * 0.72, 0.88 - pocket * 1.5, width * 0.72, 0.9, 0.12), look.accent)
    zip_y = 1.08 - pocket * 1.5
    pen.line(polygon((-width * 0.5, zip_y), (width * 0.5, zip_y)), darker(look.accent, 0.6), 0.06)
    for side in (-1, 1):
        pen.part(box(side * width * 0.5 - 0.08, top + 0.1, side * width * 0.5 + 0.08, flap + 0.08, 0.05), look.accent)
