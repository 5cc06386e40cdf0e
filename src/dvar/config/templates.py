"""Caption templates for images that have no caption of their own."""

from __future__ import annotations

# Deviates: the paper takes published lists of captions; these are our own neutral sentences in their spirit.
TEMPLATES = {
    "object": (
        "a photo of {}",
        "a photo of the {}",
        "a photo of my {}",
        "a photo of one {}",
        "a picture of a {}",
        "a picture of the {}",
        "a picture of my {}",
        "one picture of {}",
        "the photo of a {}",
        "my photo of the {}",
        "a good photo of {}",
        "a good picture of the {}",
        "a nice photo of my {}",
        "a nice picture of one {}",
        "a bright photo of the {}",
        "a bright picture of my {}",
        "a dark photo of {}",
        "a dark picture of the {}",
        "a clean photo of my {}",
        "a close-up photo of {}",
        "a close-up picture of the {}",
        "a cropped photo of a {}",
        "a photo of the small {}",
        "a photo of the large {}",
        "a picture of a nice {}",
        "a picture of the clean {}",
        "a rendering of {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a rendering in the style of {}",
        "a good picture in the style of {}",
        "a nice painting in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
        "a small picture in the style of {}",
        "a large painting in the style of {}",
        "a close-up picture in the style of {}",
        "the picture in the style of {}",
    ),
}
"""By learnable property; ``{}`` is the placeholder token's place."""

PLAIN_PROMPTS = {"object": "a photo of {}", "style": "a picture in the style of {}"}
"""The prompt of sample images, by what is learned."""
