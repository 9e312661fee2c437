"""Image files that several tests need."""

import io
import zlib

from PIL import Image


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than any image has."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)
