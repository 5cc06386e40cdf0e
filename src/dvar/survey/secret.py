"""The secret of a survey, which signs its cookies, links and tickets."""

from __future__ import annotations

import secrets
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.files import read_text
from dvar.survey.survey import SECRET_FILE, Survey

MIN_SECRET_LENGTH = 32


def read_secret(folder: Path, path: str | None = None) -> str:
    """Return the secret in a file; without ``path``, the one of the survey's folder.

    Raises:
        RefusedInput: The file cannot be read, or its secret is too short.
    """
    file = Path(path) if path else folder / SECRET_FILE
    try:
        secret = read_text(file).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"secret_file {file} cannot be read ({error}): check --secret_file"]) from error
    if len(secret) < MIN_SECRET_LENGTH:
        problem = f"a secret has at least {MIN_SECRET_LENGTH} characters, {file} has {len(secret)}"
        raise RefusedInput([f"{problem}: write a longer one, such as openssl rand -hex 32 prints"])
    return secret


def read_or_create_secret(folder: Path, path: str | None = None) -> str:
    """Return the secret as `read_secret` does; without ``path``, the first call creates the one of the survey's folder.

    Raises:
        RefusedInput: As `read_secret`, or the folder holds no survey.
    """
    file = folder / SECRET_FILE
    if not path and not file.exists():
        Survey.load(folder)
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(MIN_SECRET_LENGTH) + "\n", encoding="utf-8")
    return read_secret(folder, path)
