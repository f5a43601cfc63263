"""Contents of a folder of pictures: pictures, texts, and system files to leave out."""

from __future__ import annotations

import codecs
import csv
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from PIL import features

from lightning_difftune.errors import DataError

IMAGE_EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
    | ({".avif"} if features.check("avif") else set())
    | ({".j2k", ".jp2"} if features.check("jpg_2000") else set())
)
# Picture formats that Pillow does not read: of phones, cameras and drawing programs.
UNREAD_PICTURES = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jxl", ".nef", ".orf", ".psd"}
    | {".raf", ".raw", ".rw2", ".svg"}
).difference(IMAGE_EXTENSIONS)
CAPTION_EXTENSIONS = (".txt", ".caption")
SPLIT_FOLDERS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
# Folders of Synology, QNAP, Windows, Linux, macOS and Android: thumbnails, trash and files recovered by repairs.
_SYSTEM_FOLDERS = frozenset(
    {"#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "__macosx"}
    | {"lost+found", "lost.dir", "network trash folder", "recycled", "recycler", "system volume information"}
    | {"temporary items", "thumbnails"}
)
_SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "icon\r", "thumbs.db"})
_BYTE_ORDER_MARKS = (  # the first match counts, since the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Rows whose files are checked first, to distinguish a wrong root from single missing pictures.
_PROBED_ROWS = 100


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS or name.lower() in _SYSTEM_FILES


class Folder:
    """A folder of pictures, which counts the files that it leaves out.

    Hidden and system files and folders are left out. A link to a folder is followed unless its pictures are found
    anyway: if it leads into this folder, to a parent of it, or to the target of another link.

    Args:
        root: The folder.
        layout: The expected layout, for the error message.

    Attributes:
        left_out: Number of files or links that are not used, by kind.

    Raises:
        DataError: If there is no such folder.
    """

    def __init__(self, root: str | Path, layout: str = "expected a folder of pictures.") -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "does not exist"
            raise DataError(f"the image folder {self.root} {found}; {layout}")
        self.left_out: Counter[str] = Counter()
        self._places = [os.path.realpath(self.root)]

    def subfolders(self, folder: Path | None = None) -> list[str]:
        """Sorted names of the subfolders, without hidden and system ones and links that lead back."""
        kept = []
        place = self.root if folder is None else folder
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if not entry.is_dir():
                continue
            if is_system(entry.name):
                pictures = _count_pictures(entry.path)
                kind = "hidden folders" if entry.name.startswith(".") else f"{entry.name} folders"
                self.left_out[f"pictures in {kind}"] += pictures
            elif not entry.is_symlink() or self._leads_elsewhere(entry.path):
                kept.append(entry.name)
        return kept

    def files(self, folder: Path | None = None, *, recursive: bool) -> tuple[list[str], list[str]]:
        """Sorted paths of the pictures in a folder, and of the other files."""
        place = self.root if folder is None else folder
        pictures: list[str] = []
        other: list[str] = []
        for entry in os.scandir(place):
            if entry.is_dir():
                continue
            if is_system(entry.name):
                self.left_out["hidden or system files"] += 1
            else:
                (pictures if Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS else other).append(
                    str(Path(place, entry.name))
                )
        for name in self.subfolders(place) if recursive else ():
            below, unknown = self.files(Path(place, name), recursive=True)
            pictures += below
            other += unknown
        return sorted(pictures), sorted(other)

    def leave_out(self, files: Iterable[str]) -> None:
        """Count files that are not read, and warn of pictures among them."""
        suffixes = Counter(Path(file).suffix.lower() or "without an extension" for file in files)
        for suffix, count in suffixes.most_common():
            self.left_out[suffix] += count
        unread = {suffix: count for suffix, count in suffixes.items() if suffix in UNREAD_PICTURES}
        if unread:
            rank_zero_warn(
                f"{self.root}: {describe_counts(unread)} are left out, since Pillow does not read such pictures. "
                "Convert them to JPEG or PNG to train on them."
            )

    def _leads_elsewhere(self, link: str) -> bool:
        place = os.path.realpath(link)
        if any(_is_inside(place, known) or _is_inside(known, place) for known in self._places):
            self.left_out["links to folders that are here anyway"] += 1
            return False
        self._places.append(place)
        return True


def captions_beside(pictures: Sequence[str], other: Sequence[str]) -> dict[str, str]:
    """The text files of pictures, by picture: ``1.txt``, ``1.TXT``, ``1.caption`` or ``1.png.txt`` of ``1.png``."""
    texts: dict[str, str] = {}
    for extension in reversed(CAPTION_EXTENSIONS):  # the first extension has priority
        texts |= {os.path.splitext(file)[0].lower(): file for file in other if file.lower().endswith(extension)}
    found = {}
    for picture in pictures:
        text = texts.get(os.path.splitext(picture)[0].lower()) or texts.get(picture.lower())
        if text is not None:
            found[picture] = text
    return found


def describe_counts(counts: Mapping[str, int]) -> str:
    """Counts in words, the most frequent first."""
    return ", ".join(
        f"{count:,} {what}" for what, count in sorted(counts.items(), key=lambda entry: -entry[1]) if count
    )


def describe_files(files: Sequence[str]) -> str:
    """A description, for messages, of files that are not pictures."""
    if not files:
        return "no files"
    suffixes = Counter(Path(file).suffix or "no extension" for file in files)
    return "files of other types: " + ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """The first names and the number of further ones."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def paths_below(root: str | Path, names: Sequence[str], where: str) -> list[str]:
    """Paths of listed pictures, in the Unicode form of their names on disk.

    Raises:
        DataError: If none of the first hundred exists; ``where`` names the list.
    """
    folder = Path(root).expanduser()
    paths = [_on_disk(folder, name) for name in names]
    if not any(Path(path).is_file() for path in paths[:_PROBED_ROWS]):
        raise DataError(
            f"the pictures listed in {where} are not below {root}: {paths[0]} does not exist, nor do the next ones. "
            "Set root to the folder that the listed paths start from."
        )
    return paths


# -- texts ------------------------------------------------------------------------------------------------------------


def decode(data: bytes, where: str) -> str:
    r"""Text by its byte-order mark, or in UTF-8.

    Args:
        data: The bytes.
        where: Name of their source for messages.

    Raises:
        DataError: If it is neither; the message names the line.

    Example:
        >>> decode(b"Ger\xe4t", "1.txt")
        Traceback (most recent call last):
        lightning_difftune.errors.DataError: 1.txt, line 1: not UTF-8 (the byte 0xe4 after 'Ger'). Save it as UTF-8...
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    fix = "Save it as UTF-8, for instance with `iconv -f latin1 -t utf-8`."
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        line, end = before.count("\n") + 1, before.rpartition("\n")[2][-20:]
        kind = "UTF-8" if encoding.startswith("utf-8") else f"{encoding.upper()}, as its byte-order mark says"
        raise DataError(
            f"{where}, line {line}: not {kind} (the byte {data[error.start]:#04x} after {end!r}). {fix}"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{where}, line {line}: zero bytes, as in UTF-16 without a byte-order mark. {fix}")
    return text


def read_text(path: Path) -> str:
    """A text file by :func:`decode`."""
    return decode(path.read_bytes(), str(path))


def read_csv(path: Path, columns: Sequence[str]) -> dict[int, dict[str, str]]:
    """Rows of a table by line number; columns are separated by commas, semicolons or tabs.

    Raises:
        DataError: If it is missing, not text or not a table, or lacks one of the columns.
    """
    if not path.is_file():
        raise DataError(f"the list of images {path} does not exist.")
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} has no column {missing}; found {list(reader.fieldnames or [])}.")
        numbered = ((reader.line_num, row) for row in reader)
        return {line: {key: (row[key] or "").strip() for key in row if key is not None} for line, row in numbered}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a table ({error}).") from error


# -- details ----------------------------------------------------------------------------------------------------------


def _count_pictures(folder: str) -> int:
    """Number of pictures in a folder and below, without following links."""
    return sum(Path(name).suffix.lower() in IMAGE_EXTENSIONS for _, _, files in os.walk(folder) for name in files)


def _is_inside(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def _on_disk(folder: Path, name: str) -> str:
    path = str(folder / name.replace("\\", os.sep) if "\\" in name and not (folder / name).exists() else folder / name)
    if path.isascii() or os.path.exists(path):
        return path
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))  # macOS decomposes names, lists do not
    return next((form for form in forms if os.path.exists(form)), path)
