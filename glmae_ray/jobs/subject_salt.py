"""The secret with which DICOM patient ids become subject ids: given by the user, or made once."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from glmae_ray.errors import UserError

_VARIABLE = "GLMAE_SUBJECT_SALT"
_SHORTEST = 16  # bytes of a file that can be a salt


def subject_salt() -> bytes:
    """The value of GLMAE_SUBJECT_SALT, else a random one that is kept in the user's own folder.

    It never enters a store: who has it can find out whether a person is in there. The same salt
    gives a person the same id in every store.

    Raises:
        UserError: There is no variable, and no place to keep a salt.
    """
    if given := os.environ.get(_VARIABLE):
        return given.encode()
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "glmae"
    path = folder / "subject_salt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Exclusive and complete: of two jobs that start together one wins, and both read that.
        unfinished = folder / f".subject_salt.{os.getpid()}"
        if not path.exists():
            unfinished.touch(mode=0o600)
            unfinished.write_text(secrets.token_hex(32))
            try:
                os.link(unfinished, path)
            except FileExistsError:
                pass
            finally:
                unfinished.unlink()
        salt = path.read_bytes()
    except OSError as error:
        raise UserError(f"{_VARIABLE} is not set, and {path} cannot be used ({error})") from None
    if len(salt) < _SHORTEST:
        raise UserError(f"{path}: {len(salt)} bytes are no secret; restore it, or remove it")
    return salt


def salt_name(salt: bytes) -> str:
    """What a store may know of a salt: enough to tell that another one is used."""
    return hashlib.sha256(b"glmae subject salt\n" + salt).hexdigest()[:16]
