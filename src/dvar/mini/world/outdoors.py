"""Things that live or go outside: robot, rocket, car, boat, cactus, flower, mushroom, house, boot."""

from __future__ import annotations

import math

import skia

from dvar.mini.world.canvas import Look, Pen, box, curve, darker, lighter, mix, oval, polygon, turned, union
from dvar.mini.world.classes import thing

GLASS = (0.70, 0.88, 0.96)
GLOW = (1.0, 0.87, 0.42)
LEAF = (0.30, 0.58, 0.26)
TYRE = (0.16, 0.16, 0.19)


@thing("robot", accent="hands", shape="narrow|wide, short|tall, narrow|wide head, thin|thick limbs, , small|big eyes")
def draw_robot(pen: Pen, look: Look) -> None:
    chest, waist, head = look.between(0, 0.40, 0.62), look.between(1, 0.48, 0.74), look.between(2, 0.36, 0.56)
    limb, wave = look.between(3, 0.12, 0.24), look.between(4, -0.35, 0.4)
    eye = look.between(5, 0.12, 0.19)
    neck = waist - 0.74
    hip = neck + waist + 0.04
    top = neck - 0.52
    pen.line(curve((0, top), (0, top - 0.2)), darker(look.main, 0.6), 0.08)
    pen.part(oval(0, -0.9, 0.11, 0.11), look.accent)
    for side in (-1, 1):
        pen.tube(curve((side * chest * 0.5, hip), (side * chest * 0.5, 0.9)), darker(look.main, 0.25), limb)
        pen.part(box(side * chest * 0.55 - 0.21, 0.84, side * chest * 0.55 + 0.21, 1, 0.07), look.accent)
        hand = (side * (chest + 0.3), neck + 0.34 - side * wave)
        pen.tube(curve((side * chest * 0.9, neck + 0.16), hand), darker(look.main, 0.25), limb)
        pen.part(oval(*hand, 0.15, 0.15), look.accent)
    pen.body(box(-chest, neck, chest, hip, 0.1), look)
    pen.part(box(-head, top, head, neck + 0.02, 0.12), lighter(look.main, 0.25))
    for side in (-1, 1):
        pen.eye(side * head * 0.48, neck - 0.33, eye)
    pen.line(curve((-head * 0.4, neck - 0.13), (0, neck - 0.08), (head * 0.4, neck - 0.13)), (0.07, 0.06, 0.09), 0.06)


@thing(
    "rocket",
    accent="fins",
    shape="slim|fat, short|long nose, narrow|wide tail, small|big fins, short|long fins, small|big window",
)
def draw_rocket(pen: Pen, look: Look) -> None:
    width, nose, tail = look.between(0, 0.32, 0.54), look.between(1, 0.40, 0.75), look.between(2, 0.5, 0.85)
    fin, sweep, port = look.between(3, 0.24, 0.46), look.between(4, 0.3, 0.62), look.between(5, 0.13, 0.22)
    shoulder = nose - 0.98
    end = width * tail
    pen.part(turned([(end * 0.8, 0.68), (end * 0.6, 0.85), (0.01, 1.04)]), (1.0, 0.55, 0.12), shade=0.1)
    pen.fill(turned([(end * 0.45, 0.68), (end * 0.3, 0.82), (0.01, 0.93)]), GLOW)
    for side in (-1, 1):
        tip = side * (width + fin)
        root = side * end * 0.8
        pen.part(polygon((root, 0.72 - sweep), (tip, 0.72), (tip, 0.97), (root, 0.7)), look.accent)
    pen.body(turned([(width * 0.8, shoulder), (width, shoulder + 0.45), (width * 0.95, 0.2), (end, 0.72)]), look)
    cone = turned([(0.03, -0.98), (width * 0.5, shoulder - nose * 0.5), (width * 0.84, shoulder + 0.04)])
    pen.part(cone, look.accent)
    pen.part(oval(0, shoulder + 0.42, port + 0.09, port + 0.09), lighter(look.accent, 0.5))
    pen.part(oval(0, shoulder + 0.42, port, port), GLASS)


@thing(
    "car",
    accent="roof",
    shape="small|big wheels, low|high sides, short|long cabin, low|high roof, rear|forward cabin, square|round corners",
)
def draw_car(pen: Pen, look: Look) -> None:
    wheel, side, cabin = look.between(0, 0.24, 0.36), look.between(1, 0.48, 0.66), look.between(2, 0.40, 0.62)
    roof, lean, nose = look.between(3, 0.40, 0.60), look.between(4, -0.22, 0.12), look.between(5, 0.08, 0.3)
    floor = 1 - wheel * 0.7
    sill = floor - side
    top = sill - roof
    high = top + 0.12
    back, front = lean - cabin, lean + cabin
    roof_left, roof_right = lean - cabin * 0.8, lean + cabin * 0.55
    shell = polygon((back - 0.12, sill + 0.1), (roof_left, top), (roof_right, top), (front + 0.16, sill + 0.1))
    pen.part(shell, look.accent)
    pen.fill(polygon((back + 0.06, sill), (roof_left + 0.08, high), (lean - 0.1, high), (lean - 0.1, sill)), GLASS)
    pen.fill(polygon((lean + 0.03, sill), (lean + 0.03, high), (roof_right - 0.03, high), (front - 0.06, sill)), GLASS)
    pen.body(box(-0.98, sill, 0.98, floor, nose), look)
    pen.part(oval(0.86, sill + side * 0.42, 0.11, 0.13), GLOW)
    pen.line(curve((lean - 0.12, sill + 0.17), (lean + 0.08, sill + 0.17)), darker(look.main, 0.6), 0.07)
    for x in (-0.56, 0.54):
        pen.part(oval(x, 1 - wheel, wheel, wheel), TYRE)
        pen.part(oval(x, 1 - wheel, wheel * 0.52, wheel * 0.52), look.accent)


@thing(
    "boat",
    accent="sail",
    shape="shallow|deep hull, low|high bow, narrow|wide bottom, short|tall mast, narrow|wide sail, small|big jib",
)
def draw_boat(pen: Pen, look: Look) -> None:
    deep, bow, keel = look.between(0, 0.44, 0.72), look.between(1, 0.05, 0.28), look.between(2, 0.5, 0.8)
    high, sail, jib = look.between(3, 1.0, 1.25), look.between(4, 0.5, 0.85), look.between(5, 0.3, 0.75)
    deck = 1 - deep
    top = max(deck - high, -0.92)
    pen.line(curve((-0.05, deck + 0.1), (-0.05, top)), (0.36, 0.22, 0.13), 0.1)
    pen.part(polygon((-0.05, top), (-0.42, top + 0.11), (-0.05, top + 0.24)), mix(look.main, look.accent, 0.25))
    main = skia.Path()
    main.moveTo(0.03, top + 0.12)
    main.quadTo(sail * 0.9, (top + deck) / 2, sail + 0.03, deck - 0.12)
    main.lineTo(0.03, deck - 0.12)
    main.close()
    pen.part(main, look.accent)
    pen.part(polygon((-0.13, top + 0.38), (-0.13, deck - 0.12), (-0.13 - jib, deck - 0.12)), lighter(look.accent, 0.45))
    hull = skia.Path()
    hull.moveTo(-0.96, deck)
    hull.quadTo(0, deck + 0.12, 0.98, deck - bow)
    hull.quadTo(0.9, 0.9, keel, 1)
    hull.lineTo(-keel * 0.85, 1)
    hull.quadTo(-0.92, 0.9, -0.96, deck)
    hull.close()
    pen.body(hull, look)


@thing("cactus", accent="pot", shape="slim|fat, thin|thick arms, narrow|wide pot, , , small|big bloom")
def draw_cactus(pen: Pen, look: Look) -> None:
    trunk, arm, pot = look.between(0, 0.24, 0.38), look.between(1, 0.13, 0.19), look.between(2, 0.36, 0.56)
    left, right, bloom = look.between(3, -0.6, -0.1), look.between(4, -0.6, -0.1), look.between(5, 0.12, 0.26)
    top = -0.92 + bloom
    limbs = [box(-trunk, top, trunk, 0.7, trunk)]
    for side, tip, elbow in ((-1, left, 0.2), (1, right, 0.05)):
        middle = side * (trunk + 0.2 + arm)
        limbs.append(box(middle - arm, tip, middle + arm, elbow + arm, arm))
        limbs.append(box(min(0, middle), elbow - arm, max(0, middle), elbow + arm, 0))
        limbs.append(oval(middle, elbow, arm, arm))
    pen.body(union(*limbs), look)
    for x, y in ((-trunk, -0.3), (trunk, -0.2), (-trunk, 0.42), (trunk, 0.36)):
        pen.line(curve((x, y), (x * 1.35, y - 0.07)), darker(look.main, 0.6), 0.05)
    for x, y in ((0, -0.3), (-0.1, 0.0), (0.1, 0.27)):
        pen.line(curve((x - 0.07, y - 0.08), (x, y), (x + 0.07, y - 0.08)), darker(look.main, 0.7), 0.05)
    for turn in (-90, -18, 54, 126, 198):
        x, y = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        pen.part(oval(bloom * 0.6 * x, top + bloom * 0.6 * y, bloom * 0.5, bloom * 0.5), look.accent)
    pen.fill(oval(0, top, bloom * 0.35, bloom * 0.35), GLOW)
    pen.part(polygon((-pot, 0.62), (pot, 0.62), (pot * 0.75, 1), (-pot * 0.75, 1)), look.accent)
    pen.part(box(-pot - 0.08, 0.54, pot + 0.08, 0.71, 0.05), look.accent)


@thing(
    "flower",
    accent="heart",
    shape="few|many petals, thin|thick petals, small|big heart, short|long petals, , short|long leaves",
)
def draw_flower(pen: Pen, look: Look) -> None:
    petals, plump, heart = round(look.between(0, 4.5, 8.5)), look.between(1, 0.85, 1.25), look.between(2, 0.19, 0.32)
    reach, bend, leaf = look.between(3, 0.6, 0.76), look.between(4, -0.3, 0.3), look.between(5, 0.3, 0.62)
    y = reach - 0.98
    pen.tube(curve((0, y), (bend, (y + 1) / 2), (0, 0.97)), LEAF, 0.1)
    for side in (-1, 1):
        tip = side * leaf
        pen.part(curve((bend * 0.3, 0.92), (tip * 0.6, 0.6), (tip * 1.1, 0.52), (tip * 0.9, 0.78), closed=True), LEAF)
    crown = oval(0, y, heart, heart)
    thick = reach * 1.5 / petals * plump
    for petal in range(petals):
        angle = 360 * petal / petals - 90
        blade = oval(reach * 0.6, 0, reach * 0.4, thick)
        blade.transform(skia.Matrix.Translate(0, y).preRotate(angle))
        crown = union(crown, blade)
    pen.body(crown, look)
    for petal in range(petals):
        turn = math.radians(360 * (petal + 0.5) / petals - 90)
        ray = curve((0, y), (reach * 0.55 * math.cos(turn), y + reach * 0.55 * math.sin(turn)))
        pen.line(ray, darker(look.main, 0.55), 0.045)
    pen.part(oval(0, y, heart, heart), look.accent)


@thing(
    "mushroom",
    accent="stalk",
    shape="narrow|wide cap, flat|tall cap, pointed|round cap, thin|thick stalk, narrow|wide foot, small|big gills",
)
def draw_mushroom(pen: Pen, look: Look) -> None:
    wide, tall, peak = look.between(0, 0.68, 0.98), look.between(1, 0.7, 1.08), look.between(2, 0.3, 0.75)
    stalk, foot, gills = look.between(3, 0.2, 0.36), look.between(4, 0.0, 0.28), look.between(5, 0.06, 0.2)
    rim = tall - 0.95
    cap = skia.Path()
    cap.moveTo(-wide, rim)
    cap.cubicTo(-wide, rim - tall * 0.75, -wide * peak, -0.96, 0, -0.96)
    cap.cubicTo(wide * peak, -0.96, wide, rim - tall * 0.75, wide, rim)
    cap.quadTo(0, rim + 0.12 + gills * 2, -wide, rim)
    cap.close()
    pen.body(cap, look)
    pen.part(oval(0, rim + gills * 0.5, wide * 0.78, gills), lighter(look.accent, 0.6), shade=0.1)
    top = rim + gills * 0.6
    stem = turned([(stalk, top), (stalk, (top + 1) / 2), (stalk + foot, 0.88), (stalk + foot * 0.6, 1)])
    pen.part(stem, look.accent)


@thing(
    "house",
    accent="roof",
    shape="narrow|wide, short|tall, short|long eaves, pointed|flat roof, , small|big chimney",
)
def draw_house(pen: Pen, look: Look) -> None:
    wall, high, eaves = look.between(0, 0.58, 0.84), look.between(1, 0.8, 1.15), look.between(2, 0.08, 0.2)
    ridge, door, stack = look.between(3, 0.02, 0.5), look.between(4, -0.36, 0.36), look.between(5, 0.02, 0.2)
    top = 1 - high
    peak = top - 0.84 + 0.14 * look.shape[1]
    pen.part(box(wall * 0.45, peak - stack, wall * 0.45 + 0.16 + stack, top, 0.02), darker(look.accent, 0.3))
    pen.body(box(-wall, top - 0.05, wall, 1), look)
    rim, gutter = wall + eaves, top + 0.08
    pen.part(polygon((-rim, gutter), (-ridge, peak), (ridge, peak), (rim, gutter)), look.accent)
    pen.part(oval(0, (peak + top) / 2 + 0.1, 0.13, 0.13), GLASS)
    middle = door * wall
    pen.part(box(middle - 0.17, 0.48, middle + 0.17, 1, 0.1), darker(look.accent, 0.25))
    pen.bead(middle + 0.08, 0.76, 0.045)
    window = middle + (0.5 if door < 0 else -0.5) * (wall + 0.1)
    pen.part(box(window - 0.17, top + 0.24, window + 0.17, top + 0.56, 0.03), GLOW, shade=0.1)


@thing(
    "boot",
    accent="sole",
    shape="short|tall, narrow|wide shaft, short|long toe, low|high heel, flat|round toe, narrow|wide cuff",
)
def draw_boot(pen: Pen, look: Look) -> None:
    high, shaft, toe = look.between(0, 1.45, 1.9), look.between(1, 0.32, 0.48), look.between(2, 0.55, 0.9)
    heel, bulge, cuff = look.between(3, 0.14, 0.34), look.between(4, 0.26, 0.46), look.between(5, 0.16, 0.4)
    top = 1 - high
    sole = 1 - heel
    back = -0.8
    front = back + 2 * shaft
    arch = sole + heel * 0.45
    tread = polygon(
        (back - 0.05, sole - 0.06), (toe + 0.12, sole - 0.06), (toe + 0.04, 1), (0.02, 1), (-0.06, arch), (-0.26, arch),
        (-0.28, 1), (back, 1),
    )  # fmt: skip
    upper = skia.Path()
    upper.moveTo(back, top)
    upper.lineTo(front, top)
    upper.quadTo(front - 0.08, sole - bulge * 1.9, front + 0.2, sole - bulge * 1.25)
    upper.cubicTo(toe, sole - bulge * 1.2, toe + 0.1, sole - 0.2, toe + 0.06, sole)
    upper.lineTo(back, sole)
    upper.quadTo(back + 0.1, (top + sole) / 2, back, top)
    upper.close()
    pen.body(upper, look)
    pen.part(tread, look.accent)
    pen.part(box(back - 0.08, top - 0.02, front + 0.08, top + cuff, 0.08), look.accent)
