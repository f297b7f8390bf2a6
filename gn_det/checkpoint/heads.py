"""The first bytes of a file: whether it can hold weights, and what people hand over by mistake."""

from __future__ import annotations

import re

from gn_det.errors import WeightsError
from gn_det.files import NotRegularFile, StrPath, open_regular
from gn_det.text import one_line

ZIP = b"PK\x03\x04"  # torch.save since 1.6
PICKLE = b"\x80"  # torch.save before, and pickles since protocol 2
_NOT_WEIGHTS = (
    (b"<", "a web page or XML, probably a failed download; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)
# Pickles of protocol 0 and 1 have no mark: an empty dict, or a mark and a dict, or a dict's class.
_OLD_PICKLE = re.compile(rb"\(d[p.]|\}[q.(]|ccollections\n")


def read_head(path: StrPath, size: int = 64) -> bytes:
    """Return the first bytes of a regular file that must hold something.

    Raises:
        WeightsError: no such file, a folder, pipe or device, unreadable, or empty.
    """
    where = one_line(str(path), 400)
    try:
        with open_regular(path) as file:
            head = file.read(size)
    except FileNotFoundError:
        raise WeightsError(f"{where}: no such file; give an existing checkpoint (MODEL.WEIGHTS)") from None
    except IsADirectoryError:
        raise WeightsError(f"{where}: is a folder; give the checkpoint file in it, such as model_best.pth") from None
    except NotRegularFile as error:
        raise WeightsError(f"{where}: {error.strerror}; give a checkpoint file (MODEL.WEIGHTS)") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{where}: cannot be read ({one_line(getattr(error, 'strerror', '') or error)})") from None
    if not head:
        raise WeightsError(f"{where}: is empty; copy or download it again")
    return head


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes are a header's length and its opening brace."""
    return head[8:9] == b"{" and head[:4] != ZIP


def known_mistake(head: bytes) -> str:
    """Return what a file that is not weights seems to be, and what to do; "" when it looks like nothing known."""
    return next((what for magic, what in _NOT_WEIGHTS if head.lstrip().startswith(magic)), "")


def not_weights(head: bytes) -> str:
    """Return what a file is instead of weights, by its first bytes; "" where it can be weights."""
    pickled = head[:1] == PICKLE and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")
    if head.startswith(ZIP) or looks_like_safetensors(head) or pickled or _OLD_PICKLE.match(head):
        return ""
    return known_mistake(head) or f"something that begins with {one_line(head[:16], 80)}"
