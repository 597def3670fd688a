"""Photos: read and written with their bit depth, EXIF, ICC profile, XMP, alpha and greyness.

What a file is decides its content, not its name; how deep it is decides its type, never its largest
value. Every photo comes upright: the EXIF orientation is applied and reset.
"""

from imgtool.files import extension, file_type
from imgtool.images.photo import Photo, convert, to_float, to_type, turn
from imgtool.images.reading import LARGEST, READABLE, WRITABLE, read, read_rgb8, size
from imgtool.images.writing import encode, encoder, losses, write

__all__ = [
    "LARGEST",
    "READABLE",
    "WRITABLE",
    "Photo",
    "convert",
    "encode",
    "encoder",
    "extension",
    "file_type",
    "losses",
    "read",
    "read_rgb8",
    "size",
    "to_float",
    "to_type",
    "turn",
    "write",
]
