"""Pillow's own font, laid out the same on every machine."""

from functools import cache

from PIL import ImageFont


@cache
def plain_font(size_px: float) -> ImageFont.FreeTypeFont:
    """Return Aileron, the font inside Pillow (CC0 1.0), with the basic layout.

    Pillow's default layout depends on whether the system library FriBiDi is installed.
    """
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError("this Pillow was built without FreeType; install Pillow's wheel")
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
