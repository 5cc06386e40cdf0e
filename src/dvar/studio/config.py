"""Settings of `dvar studio`, with their help and checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dvar.config.fields import Config, Range, invalid_fields, setting
from dvar.files import read_text

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine can reach."""
MIN_PASSWORD = 12


@dataclass(frozen=True, kw_only=True)
class StudioConfig(Config):
    """Every setting of ``dvar studio``; by default only this machine can reach it."""

    host: str = setting("127.0.0.1", "Address to listen on; any other than this machine's own needs a password_file.")
    port: int = setting(7860, "Port to listen on; 0 takes a free one.", Range(0, 65536))
    password_file: str | None = setting(
        None, f"File with the password that the studio asks for, of at least {MIN_PASSWORD} characters."
    )
    models_dir: str | None = setting(
        None, "Folder of base models to choose from: diffusers folders and .safetensors files."
    )


def problems(config: StudioConfig) -> list[str]:
    """Return everything wrong with these settings, one line each."""
    lines = [line for _, line in invalid_fields(config)]
    if lines:
        return lines
    if config.host not in LOOPBACK and not config.password_file:
        rule = f"password_file is missing: it is needed to listen on {config.host}, which other machines can reach"
        lines.append(f"{rule}: name a file with a password")
    if config.password_file:
        try:
            read_password(config.password_file)
        except ValueError as error:
            lines.append(str(error))
    if config.models_dir and not Path(config.models_dir).expanduser().is_dir():
        lines.append(f"models_dir must be a folder, and {config.models_dir} is none: check the path")
    return lines


def read_password(path: str) -> str:
    """Return the password in a file, without the line break at its end.

    Raises:
        ValueError: The file cannot be read, or the password is short.
    """
    try:
        password = read_text(Path(path).expanduser()).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"password_file {path} cannot be read ({reason}): check the path") from error
    if len(password) < MIN_PASSWORD:
        rule = f"password_file {path} must hold at least {MIN_PASSWORD} characters, got {len(password)}"
        raise ValueError(f"{rule}: write a longer password into it")
    return password
