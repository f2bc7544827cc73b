"""MovieLens-1M and MovieLens-latest in GroupLens' files.

Source: Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5, 4 (2015).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from tools.public_data.files import PublicFile, PublicTable, find_source_file
from tools.public_data.movielens_100k import title_and_year

EVENTS = ("user_id", "item_id", "rating", "timestamp")
NO_GENRES = "(no genres listed)"
OCCUPATIONS = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip


def read_movielens_1m(source: Path) -> Iterator[PublicTable]:
    """Yield the ratings, the rated films and the users of a folder with ratings.dat, movies.dat and users.dat.

    Raises DataError.
    """
    movies = PublicFile(find_source_file(source, "movies.dat"), "movielens-1m")
    films = _films(movies, _fields(movies, "MovieID::Title::Genres"))
    people = _people(PublicFile(find_source_file(source, "users.dat"), "movielens-1m"))
    ratings = PublicFile(find_source_file(source, "ratings.dat"), "movielens-1m")
    rated: set[str] = set()
    yield PublicTable("interactions", EVENTS, _ratings_1m(ratings, films, people, rated))
    # the protocol of published results ranks only rated items
    note = f"{len(films) - len(rated):,} films without a rating are dropped from the items"
    items = (film for item, film in films.items() if item in rated)
    yield PublicTable("items", ("item_id", "title", "genres", "year"), items, note if len(rated) < len(films) else "")
    yield PublicTable("users", ("user_id", "gender", "age", "occupation", "zip_digit"), people.values())


def read_movielens_latest(source: Path) -> Iterator[PublicTable]:
    """Yield the ratings and all films of a folder with ratings.csv, movies.csv and tags.csv. Raises DataError."""
    movies = PublicFile(find_source_file(source, "movies.csv"), "movielens-latest")
    films = _films(movies, movies.rows(("movieId", "title", "genres")))
    tags = _tags(PublicFile(find_source_file(source, "tags.csv"), "movielens-latest"), films)
    ratings = PublicFile(find_source_file(source, "ratings.csv"), "movielens-latest")
    yield PublicTable("interactions", EVENTS, _ratings_latest(ratings, films))
    tagged = ((*film, "|".join(tags.get(item, ()))) for item, film in films.items())
    yield PublicTable("items", ("item_id", "title", "genres", "year", "tags"), tagged)


def _fields(file: PublicFile, needed: str) -> Iterator[list[str]]:
    """Yield the fields per line of a file of MovieLens-1M."""
    for line in file.lines("latin-1"):
        fields = line.split("::")
        file.check(len(fields) == needed.count("::") + 1 and all(fields), line, f"`{needed}`")
        yield fields


def _films(file: PublicFile, rows: Iterable[list[str]]) -> dict[str, tuple[str, ...]]:
    films: dict[str, tuple[str, ...]] = {}
    for item, title, genres in rows:
        _check_new(file, item, films)
        name, year = title_and_year(title)
        films[item] = item, name, "" if genres == NO_GENRES else genres, year
    return films


def _people(file: PublicFile) -> dict[str, tuple[str, ...]]:
    people: dict[str, tuple[str, ...]] = {}
    for user, gender, age, occupation, zip_code in _fields(file, "UserID::Gender::Age::Occupation::Zip-code"):
        _check_new(file, user, people)
        file.check_number("age", age)
        known = occupation.isdecimal() and len(occupation) <= 2 and int(occupation) < len(OCCUPATIONS)
        file.check(known, occupation, f"an occupation from 0 to {len(OCCUPATIONS) - 1}")
        people[user] = user, gender, age, OCCUPATIONS[int(occupation)], zip_code[0]
    return people


def _tags(file: PublicFile, films: Container[str]) -> dict[str, dict[str, None]]:
    """Return the distinct lower-case tags per film, in file order."""
    tags: dict[str, dict[str, None]] = {}
    for item, tag in file.rows(("movieId", "tag")):
        file.check(item in films, item, "a film of movies.csv")
        # a tag that contains the separator is split
        words = (" ".join(part.lower().split()) for part in tag.split("|"))
        tags.setdefault(item, {}).update((word, None) for word in words if word)
    return tags


def _ratings_1m(
    file: PublicFile, films: Container[str], people: Container[str], rated: set[str]
) -> Iterator[list[str]]:
    for fields in _fields(file, "UserID::MovieID::Rating::Timestamp"):
        user, item, rating, timestamp = fields
        file.check(user in people, user, "a user of users.dat")
        _check_rating(file, item, films, "movies.dat", rating, timestamp)
        rated.add(item)
        yield fields


def _ratings_latest(file: PublicFile, films: Container[str]) -> Iterator[list[str]]:
    for fields in file.rows(("userId", "movieId", "rating", "timestamp")):
        user, item, rating, timestamp = fields
        file.check(user != "", user, "a user")
        _check_rating(file, item, films, "movies.csv", rating, timestamp)
        yield fields


def _check_rating(file: PublicFile, item: str, films: Container[str], table: str, rating: str, timestamp: str) -> None:
    file.check(item in films, item, f"a film of {table}")
    file.check_number("rating", rating)
    file.check_number("timestamp", timestamp)


def _check_new(file: PublicFile, key: str, known: Container[str]) -> None:
    file.check(key != "" and key not in known, key, "an id that no earlier line has")
