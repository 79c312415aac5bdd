"""Real images of many classes without a download: characters drawn in the fonts of this machine.

A class is a character; its images are the fonts that have it. The characters are symbols and
letters of scripts other than Latin, none of which looks like another: of Cyrillic and Greek only
capitals that differ from each other and from Latin ones, and Greek small letters.

    apt-get install <the packages in PACKAGES>
    python jobs/benchmark.py fonts data/fonts
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PACKAGES = """
    culmus fonts-arabeyes fonts-beng fonts-dejavu fonts-deva
    fonts-fantasque-sans fonts-firacode fonts-freefont-ttf fonts-hack fonts-hosny-amiri fonts-inter
    fonts-ipaexfont
    fonts-ipafont fonts-jetbrains-mono fonts-kacst fonts-liberation fonts-linuxlibertine
    fonts-noto-cjk fonts-noto-core fonts-noto-extra fonts-open-sans fonts-paratype fonts-roboto
    fonts-sil-charis fonts-sil-doulos fonts-sil-gentium fonts-takao fonts-thai-tlwg fonts-vlgothic
    fonts-mplus fonts-lato fonts-quicksand fonts-comfortaa fonts-croscore
"""
FOLDER = Path("/usr/share/fonts")
ENDINGS = (".ttf", ".otf", ".ttc")

GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσςφψω"
CYRILLIC = "БДЖИЛЦЧШЫЭЮЯЄЂЉЊ"
HEBREW = "אבגדהזחטכלםמנסעפצקרשתץףך"
ARABIC = "ابتثجحدرسشصضطعغفقكلمنهوي"
THAI = "กขคงจชซญฐณดตทธนบปผฝพฟมยรลวศสหอฮ"
DEVANAGARI = "अइउएकखगघचछजटठडढतथदनपफभमयरलवशषसह"
HIRAGANA = (
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふほまみむめもやゆよらりるれろわをん"
)
KATAKANA = "アイウオカキクケコサシスセソタチツテトナヌネノハヒフホマミムメモヤユヨラルレワン"
GEORGIAN = "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ"
ARMENIAN = "ԱԲԳԴԵԶԷԸԺԻԽԾԿՀՁՂՃՄՅՆՇՉՊՋՌՍՎՏՐՑՓՔ"
SYMBOLS = "∑∏∫√∞≈≠≤≥±÷¬◊∂¶§©®™†‡•€£¥¢&@#%?!{}[]<>~^*+=|/¿¡«»…‰←→↑↓"
CHARACTERS = (
    "".join(
        (GREEK, CYRILLIC, HEBREW, ARABIC, THAI, DEVANAGARI, HIRAGANA, KATAKANA, GEORGIAN, ARMENIAN)
    )
    + SYMBOLS
)

SIDE, MARGIN = 64, 6  # pixels
MISSING = "\U0010fffe"  # no character: what a font draws for those that it lacks


def draw(folder: Path, fewest: int = 100, most: int = 150, seed: int = 0) -> dict[str, int]:
    """Write FOLDER/U+XXXX/NAME.png for each character that at least `fewest` fonts draw, each in
    its own way, of which `most` at random are taken. Returns the number of images by class."""
    found: dict[str, dict[str, tuple[str, Image.Image]]] = defaultdict(dict)
    for name, font in fonts():
        blank = bytes(font.getmask(MISSING))
        for character in CHARACTERS:
            picture = _picture(font, character, blank)
            if picture is not None:
                found[character].setdefault(
                    hashlib.sha1(picture.tobytes()).hexdigest(), (name, picture)
                )
    rng = np.random.default_rng(seed)
    counts = {}
    for character in CHARACTERS:
        pictures = sorted(found[character].values(), key=lambda one: one[0])
        if len(pictures) < fewest:
            continue
        taken = rng.permutation(len(pictures))[:most]
        place = folder / f"U+{ord(character):04X}"
        place.mkdir(parents=True, exist_ok=True)
        for number in sorted(taken):
            name, picture = pictures[number]
            picture.save(place / f"{name}.png")
        counts[place.name] = len(taken)
    return counts


def fonts() -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Every face of every font file, with a name that no other has."""
    for path in sorted(p for p in FOLDER.rglob("*") if p.suffix.lower() in ENDINGS):
        for face in range(20):
            try:
                font = ImageFont.truetype(str(path), SIDE, index=face)
            except OSError:
                break  # no more faces, or no font
            yield f"{'-'.join(path.relative_to(FOLDER).parts)}-{face}", font


def _picture(font: ImageFont.FreeTypeFont, character: str, missing: bytes) -> Image.Image | None:
    """Black on white, scaled to fill the square but for a margin; None: the font lacks it."""
    try:
        mask = font.getmask(character)
        if bytes(mask) == missing or not mask.getbbox():
            return None
        left, top, right, bottom = font.getbbox(character)
    except (OSError, ValueError):
        return None
    width, height = int(right - left), int(bottom - top)
    if min(width, height) < 4:
        return None
    sheet = Image.new("L", (width, height), 255)
    ImageDraw.Draw(sheet).text((-left, -top), character, font=font, fill=0)
    scale = (SIDE - 2 * MARGIN) / max(width, height)
    small = sheet.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    picture = Image.new("L", (SIDE, SIDE), 255)
    picture.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return picture
