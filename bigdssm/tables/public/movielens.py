"""MovieLens-1M and MovieLens-latest in GroupLens' own files.

Source: Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5, 4 (2015).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

from bigdssm.tables.movielens import title_and_year
from bigdssm.tables.public.files import check_number, csv_rows, find, lines, wrong_line
from bigdssm.tables.public.table import Table

EVENTS = ("user_id", "item_id", "rating", "timestamp")
NO_GENRES = "(no genres listed)"
OCCUPATIONS = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip


def read_movielens_1m(source: Path) -> Iterator[Table]:
    """Yield the ratings, the films that have one, and the users of the folder with ratings.dat, movies.dat, users.dat.

    Raises DataError.
    """
    films, people = _films_1m(find(source, "movies.dat")), _people(find(source, "users.dat"))
    rated: set[str] = set()
    yield Table("interactions", EVENTS, _ratings_1m(find(source, "ratings.dat"), films, people, rated))
    # The protocol of the published figures ranks the items that occur.
    note = f"{len(films) - len(rated):,} films without a rating are left out of the items"
    kept = (film for item, film in films.items() if item in rated)
    yield Table("items", ("item_id", "title", "genres", "year"), kept, note if len(rated) < len(films) else "")
    yield Table("users", ("user_id", "gender", "age", "occupation", "zip_digit"), people.values())


def read_movielens_latest(source: Path) -> Iterator[Table]:
    """Yield the ratings and all films, those without a rating too, of the folder with ratings, movies and tags .csv.

    Raises DataError.
    """
    films = _films_latest(find(source, "movies.csv"))
    tags = _tags(find(source, "tags.csv"), films)
    yield Table("interactions", EVENTS, _ratings_latest(find(source, "ratings.csv"), films))
    tagged = ((*film, "|".join(tags.get(item, ()))) for item, film in films.items())
    yield Table("items", ("item_id", "title", "genres", "year", "tags"), tagged)


def _fields_1m(path: Path, needed: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines(path, "latin-1"):
        fields = line.split("::")
        if len(fields) != needed.count("::") + 1 or not all(fields):
            raise wrong_line(path, number, line, f"`{needed}`", "movielens-1m")
        yield number, fields


def _films_1m(path: Path) -> dict[str, tuple[str, ...]]:
    films: dict[str, tuple[str, ...]] = {}
    for number, (item, title, genres) in _fields_1m(path, "MovieID::Title::Genres"):
        _check_new(path, number, item, films, "movielens-1m")
        name, year = title_and_year(title)
        films[item] = item, name, genres, year
    return films


def _people(path: Path) -> dict[str, tuple[str, ...]]:
    people: dict[str, tuple[str, ...]] = {}
    needed = "UserID::Gender::Age::Occupation::Zip-code"
    for number, (user, gender, age, occupation, zip_code) in _fields_1m(path, needed):
        _check_new(path, number, user, people, "movielens-1m")
        check_number(path, number, "age", age, "movielens-1m")
        if not occupation.isdecimal() or len(occupation) > 2 or int(occupation) >= len(OCCUPATIONS):
            expected = f"an occupation from 0 to {len(OCCUPATIONS) - 1}"
            raise wrong_line(path, number, occupation, expected, "movielens-1m")
        people[user] = user, gender, age, OCCUPATIONS[int(occupation)], zip_code[0]
    return people


def _ratings_1m(path: Path, films: Container[str], people: Container[str], rated: set[str]) -> Iterator[list[str]]:
    for number, fields in _fields_1m(path, "UserID::MovieID::Rating::Timestamp"):
        _check_known(path, number, "user", fields[0], people, "users.dat", "movielens-1m")
        _check_rating(path, number, fields, films, "movies.dat", "movielens-1m")
        rated.add(fields[1])
        yield fields


def _films_latest(path: Path) -> dict[str, tuple[str, ...]]:
    films: dict[str, tuple[str, ...]] = {}
    for number, (item, title, genres) in csv_rows(path, ("movieId", "title", "genres"), "movielens-latest"):
        _check_new(path, number, item, films, "movielens-latest")
        name, year = title_and_year(title)
        films[item] = item, name, "" if genres == NO_GENRES else genres, year
    return films


def _tags(path: Path, films: Container[str]) -> dict[str, dict[str, None]]:
    """Return each film's distinct tags in lower case, in the file's order."""
    tags: dict[str, dict[str, None]] = {}
    for number, (item, tag) in csv_rows(path, ("movieId", "tag"), "movielens-latest"):
        _check_known(path, number, "film", item, films, "movies.csv", "movielens-latest")
        # A tag with the separator in it is several.
        words = (" ".join(part.lower().split()) for part in tag.split("|"))
        tags.setdefault(item, {}).update((word, None) for word in words if word)
    return tags


def _ratings_latest(path: Path, films: Container[str]) -> Iterator[list[str]]:
    for number, fields in csv_rows(path, ("userId", "movieId", "rating", "timestamp"), "movielens-latest"):
        _check_rating(path, number, fields, films, "movies.csv", "movielens-latest")
        yield fields


def _check_rating(path: Path, number: int, fields: list[str], films: Container[str], table: str, kind: str) -> None:
    user, item, rating, timestamp = fields
    if not user:
        raise wrong_line(path, number, user, "a user", kind)
    _check_known(path, number, "film", item, films, table, kind)
    check_number(path, number, "rating", rating, kind)
    check_number(path, number, "timestamp", timestamp, kind)


def _check_known(path: Path, number: int, what: str, key: str, known: Container[str], table: str, kind: str) -> None:
    if key not in known:
        raise wrong_line(path, number, key, f"a {what} of {table}", kind)


def _check_new(path: Path, number: int, key: str, known: Container[str], kind: str) -> None:
    if not key or key in known:
        raise wrong_line(path, number, key, "an id that no line before has", kind)
