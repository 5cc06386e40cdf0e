"""The next run, while it is prepared: its images with their captions, and what the form holds, on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvar.files import check_regular, read_json, read_text, remove, write_atomically, write_json
from dvar.studio.run_files import HOME, IMAGES

FORM = "form.json"
MAX_IMAGES = 100
"""Images of a draft: concepts have 3 to 20, and the browser shows them all."""
MAX_IMAGE_BYTES = 100_000_000


class Draft:
    """The run that is prepared in a library: there is one, so that it survives a reload and another browser.

    Args:
        root: The folder of the library.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / HOME / "draft"
        self.images_folder = self.folder / IMAGES

    @property
    def images(self) -> list[Path]:
        """The images, by name."""
        if not self.images_folder.is_dir():
            return []
        return sorted(path for path in self.images_folder.iterdir() if path.suffix != ".txt" and path.is_file())

    def add(self, uploads: Iterable[Path]) -> list[str]:
        """Copy files into the draft and return what is wrong with those that were not.

        Whether they are images that a run can use is for preflight to say.
        """
        problems = []
        self.images_folder.mkdir(parents=True, exist_ok=True)
        for upload in uploads:
            name = self._free_name(upload.name)
            if len(self.images) >= MAX_IMAGES:
                problems.append(f"a run takes at most {MAX_IMAGES} images here: use dvar train for {upload.name}")
            elif check_regular(upload) > MAX_IMAGE_BYTES:
                problems.append(f"an image has at most 100 MB, and {upload.name} is larger: scale it down")
            else:
                shutil.copyfile(upload, self.images_folder / name)
        return problems

    def remove_image(self, name: str) -> None:
        """Remove an image and its caption; a name that is none of theirs does nothing."""
        for path in self.images:
            if path.name == name:
                remove(path)
                remove(path.with_suffix(".txt"))

    def caption(self, image: Path) -> str:
        """Return the caption of an image; an empty text where it has those of the templates."""
        path = image.with_suffix(".txt")
        return read_text(path).strip() if path.exists() else ""

    def write_caption(self, name: str, text: str) -> None:
        """Write the caption of an image, or remove it where the text is empty."""
        for path in self.images:
            if path.name == name:
                caption = path.with_suffix(".txt")
                if words := " ".join(text.split()):
                    write_atomically(caption, words.encode())
                else:
                    remove(caption)

    def fill_captions(self, templates: Sequence[str]) -> None:
        """Give each image without a caption one of the templates, in turn."""
        for number, image in enumerate(self.images):
            if not self.caption(image):
                self.write_caption(image.name, templates[number % len(templates)])

    def read_form(self) -> dict[str, Any]:
        """Return what the form holds; nothing where it was never filled in."""
        try:
            form: dict[str, Any] = read_json(self.folder / FORM, dict)
        except (OSError, ValueError):
            return {}
        return form

    def write_form(self, form: Mapping[str, Any]) -> None:
        """Remember what the form holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FORM, dict(form))

    def move_images(self, folder: Path) -> None:
        """Move the images and their captions into the folder of a run, which is theirs from here on."""
        folder.mkdir(parents=True, exist_ok=True)
        self.images_folder.rename(folder / IMAGES)

    def _free_name(self, name: str) -> str:
        """Return a plain name for an image whose caption is no other image's."""
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).name).lstrip(".") or "image"
        stem, suffix = Path(plain).stem, Path(plain).suffix.lower()
        suffix = ".image" if suffix == ".txt" else suffix
        stems, number, free = {path.stem for path in self.images}, 2, stem
        while free in stems:
            free, number = f"{stem}-{number}", number + 1
        return f"{free}{suffix}"
