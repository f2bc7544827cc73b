"""Public datasets are converted without losses; files with another layout give one-line errors."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigdssm.commands.make_shards import main as make_shards
from bigdssm.dataset.schema import Schema
from tools.public_data.__main__ import main

BEAUTY = "u1 a b c\nu2 b a\n"
BEAUTY_ATTRIBUTES = {"a": [7, "x"], "c": [], "z": [9]}
ML_1M = {
    "ratings.dat": "1::10::5::978300760\n1::11::3::978302109\n2::10::4::978301968\n",
    "movies.dat": "10::Am\xe9lie, \"The\" (2001)::Comedy|Romance\n11::Untitled::Drama\n12::Unseen (1999)::War\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::02460-1234\n",
}  # fmt: skip
ML_LATEST = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,10,2.5,1260759144\n2,11,4.0,1260759179\n",
    "movies.csv": 'movieId,title,genres\n10,"Lost,\tA (1995)",Drama|War\n11,Naïve,(no genres listed)\n12,B (9),War\n',
    "tags.csv": 'userId,movieId,tag,timestamp\n5,10,Dark  City,1\n6,10,"dark city",2\n6,12,"say ""a|b""",3\n',
}  # fmt: skip


def write(folder: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        content = text.encode(encoding)
        (folder / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    return folder


def tables(out: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in out.iterdir()}


def test_sasrec_events_get_positions_within_their_user(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "in", {"ml-1m.txt": "1 30\n1 20\n2 30\n1 30\r\n\n2 9"}) / "ml-1m.txt"
    assert main(["sasrec", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert tables(tmp_path / "out") == {
        "interactions": ["user_id\titem_id\tposition", "1\t30\t0", "1\t20\t1", "2\t30\t0", "1\t30\t2", "2\t9\t1"],
        "items": ["item_id", "30", "20", "9"],
    }
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 5 interactions of 2 users, 3 items\n"


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (("sequences.txt.xz", "item2attributes.json.xz"), "."),
        (("sequences.txt", "item2attributes.json"), "sequences.txt"),
        (("Beauty.txt", "Beauty_item2attributes.json"), "."),
        (("Mine.txt.xz", "Mine_item2attributes.json"), "Mine.txt.xz"),
    ],
)
def test_s3rec_sequences_and_attributes(tmp_path: Path, capsys: Any, names: tuple[str, str], given: str) -> None:
    source = write(tmp_path / "in", {names[0]: BEAUTY, names[1]: json.dumps(BEAUTY_ATTRIBUTES, indent=1)})
    assert main(["s3rec", "--source", str(source / given), "--out", str(tmp_path / "out")]) == 0
    events = ["u1\ta\t0", "u1\tb\t1", "u1\tc\t2", "u2\tb\t0", "u2\ta\t1"]
    assert tables(tmp_path / "out") == {
        "interactions": ["user_id\titem_id\tposition", *events],
        "items": ["item_id\tattributes", "a\t7 x", "b\t", "c\t"],
    }
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("5 interactions of 2 users, 3 items")
    assert said[1:] == ["note: 1 items with attributes but without interactions are dropped"]


def test_s3rec_without_attributes(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"Toys_and_Games.txt": BEAUTY})
    assert main(["s3rec", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert tables(tmp_path / "out")["items"] == ["item_id\tattributes", "a\t", "b\t", "c\t"]


def test_movielens_1m_is_latin_1_and_keeps_the_films_that_occur(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "in", ML_1M, "latin-1")
    assert main(["movielens-1m", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    rows = ["1\t10\t5\t978300760", "1\t11\t3\t978302109", "2\t10\t4\t978301968"]
    assert tables(tmp_path / "out") == {
        "interactions": ["user_id\titem_id\trating\ttimestamp", *rows],
        "items": ["item_id\ttitle\tgenres\tyear", '10\tAmélie, "The"\tComedy|Romance\t2001', "11\tUntitled\tDrama\t"],
        "users": [
            "user_id\tgender\tage\toccupation\tzip_digit",
            "1\tF\t1\tK-12 student\t4",
            "2\tM\t56\tself-employed\t0",
        ],
    }
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 3 interactions of 2 users, 2 items",
        "note: 1 films without a rating are dropped from the items",
    ]


def test_movielens_latest_keeps_all_films_and_distinct_tags(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "in", {f"{name}.xz": text for name, text in ML_LATEST.items()})
    assert main(["movielens-latest", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert tables(tmp_path / "out") == {
        "interactions": ["user_id\titem_id\trating\ttimestamp", "1\t10\t2.5\t1260759144", "2\t11\t4.0\t1260759179"],
        "items": [
            "item_id\ttitle\tgenres\tyear\ttags",
            "10\tLost, A\tDrama|War\t1995\tdark city",
            "11\tNaïve\t\t\t",
            '12\tB (9)\tWar\t\tsay "a|b"',
        ],
    }
    assert capsys.readouterr().out.endswith("2 interactions of 2 users, 3 items\n")


@pytest.mark.parametrize(
    ("kind", "name", "text", "where", "words"),
    [
        ("sasrec", "f.txt", "1 2\n3\n", "f.txt, line 2", ["got '3'", "`user item`", "correct the line"]),
        ("sasrec", "f.txt", "1 2 3\n", "f.txt, line 1", ["got '1 2 3'", "another kind than sasrec"]),
        ("sasrec", "f.txt", "\n", "f.txt", ["no events"]),
        ("sasrec", "f.txt", "1 2\n1 3\x00\n", "f.txt, line 2", ["got a NUL character", "download the file again"]),
        ("s3rec", "item2attributes.json", '{"a": ["x\\u0000"]}', "json, item 'a'", ["each one word"]),
        ("s3rec", "sequences.txt", "1 2\n\n2\n", "sequences.txt, line 3", ["got '2'", "at least one item"]),
        ("s3rec", "sequences.txt", "1 2\n1 3\n", "sequences.txt, line 2", ["each user once", "line 1"]),
        ("s3rec", "item2attributes.json", '{"a": [1],\n"b" 2}', "json, line 2", ["one JSON object"]),
        ("s3rec", "item2attributes.json", "[1]", "json, line 1", ["a JSON list", "an object"]),
        ("s3rec", "item2attributes.json", '{"a": [%s]}' % ("7" * 5000), "json", ["digits", "words and numbers"]),
        ("s3rec", "item2attributes.json", "[" * 10**5, "json", ["recursion", "words and numbers"]),
        ("s3rec", "item2attributes.json", '{"a": ["\\ud800"]}', "json", ["surrogates", "words and numbers"]),
        ("s3rec", "item2attributes.json", '{"a": [true]}', "item 'a'", ["[True]", "one word or a whole number"]),
        ("s3rec", "item2attributes.json", '{"a": 1}', "json, item 'a'", ["a list of attributes"]),
        ("s3rec", "item2attributes.json", '{"a": ["x y"]}', "json, item 'a'", ["each one word"]),
        ("movielens-1m", "ratings.dat", "1::10::good::9\n", "ratings.dat, line 1", ["'good'", "a number as rating"]),
        ("movielens-1m", "ratings.dat", "1::10::inf::9\n", "ratings.dat, line 1", ["'inf'", "a number as rating"]),
        ("movielens-1m", "ratings.dat", "1::10::5::x\n", "ratings.dat, line 1", ["'x'", "a number as timestamp"]),
        ("movielens-1m", "ratings.dat", "1::10::5\n", "ratings.dat, line 1", ["`UserID::MovieID::Rating::Timestamp`"]),
        ("movielens-1m", "ratings.dat", "1::99::5::9\n", "ratings.dat, line 1", ["'99'", "a film of movies.dat"]),
        ("movielens-1m", "ratings.dat", "9::10::5::9\n", "ratings.dat, line 1", ["'9'", "a user of users.dat"]),
        ("movielens-1m", "users.dat", "1::F::1::99::4\n", "users.dat, line 1", ["'99'", "from 0 to 20"]),
        ("movielens-1m", "users.dat", "1::F::1::9::4\n" * 2, "users.dat, line 2", ["'1'", "an id that no earlier"]),
        ("movielens-latest", "ratings.csv", "userId,movieId,rating\n", "ratings.csv, line 1", ["a column timestamp"]),
        (
            "movielens-latest", "ratings.csv", "userId,movieId,rating,timestamp\n1,10,many,5\n",
            "ratings.csv, line 2", ["'many'", "a number as rating"],
        ),
        ("movielens-latest", "movies.csv", "movieId,title,genres\n1,2\n", "movies.csv, line 2", ["'1,2'", "3 fields"]),
        ("movielens-latest", "movies.csv", 'movieId,title,genres\n1,"2,3\n', "movies.csv, line 2", ["closed quotes"]),
        ("movielens-latest", "movies.csv", "movieId,title,genres\n,A,War\n", "movies.csv, line 2", ["an id that no"]),
        (
            "movielens-latest", "ratings.csv", "userId,movieId,rating,timestamp\n,10,3,5\n",
            "ratings.csv, line 2", ["got '', needs a user"],
        ),
        ("movielens-latest", "tags.csv", "movieId,tag\n77,x\n", "tags.csv, line 2", ["'77'", "a film of movies.csv"]),
    ],
)  # fmt: skip
def test_a_bad_file_gives_a_one_line_error_and_leaves_the_old_tables(
    tmp_path: Path, capsys: Any, kind: str, name: str, text: str, where: str, words: list[str]
) -> None:
    whole: dict[str, dict[str, str]] = {
        "sasrec": {},
        "s3rec": {"sequences.txt": BEAUTY},
        "movielens-1m": ML_1M,
        "movielens-latest": ML_LATEST,
    }
    encoding = "latin-1" if kind == "movielens-1m" else "utf-8"
    source = write(tmp_path / "in", whole[kind] | {name: text}, encoding)
    out = write(tmp_path / "out", {"interactions.tsv": "before"})
    given = source / name if kind == "sasrec" else source
    assert main([kind, "--source", str(given), "--out", str(out)]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: {source}")
    assert where in said and all(word in said for word in words), said
    assert tables(out) == {"interactions": ["before"]}


@pytest.mark.parametrize(
    ("kind", "files", "given", "words"),
    [
        ("sasrec", {}, "f.txt", ["f.txt: got no such file", "give another --source"]),
        ("sasrec", {}, ".", ["got a folder, needs a file"]),
        ("s3rec", {}, ".", ["got none of them", "Beauty.txt", "--source"]),
        ("s3rec", {"Beauty.txt": "", "sequences.txt.xz": ""}, ".", ["sequences.txt and Beauty.txt", "name the file"]),
        ("movielens-1m", {"movies.dat": ""}, ".", ["got no users.dat", ".xz"]),
        ("movielens-1m", {}, "nowhere", ["got no such folder", "movies.dat"]),
        ("movielens-latest", {"movies.csv": ""}, "movies.csv", ["got a file, needs a folder"]),
        ("movielens-latest", {"movies.csv": "movieId,title,genres\n"}, ".", ["got no tags.csv"]),
    ],
)
def test_a_missing_file_gives_a_one_line_error(
    tmp_path: Path, capsys: Any, kind: str, files: dict[str, str], given: str, words: list[str]
) -> None:
    source = write(tmp_path / "in", files) / given
    assert main([kind, "--source", str(source), "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_bytes_give_a_one_line_error(tmp_path: Path, capsys: Any) -> None:
    cut, foreign = tmp_path / "cut.txt.xz", tmp_path / "foreign.txt"
    cut.write_bytes(lzma.compress(b"1 2\n" * 1000)[:-20])
    foreign.write_bytes(b"1 2\n1 \xe9\n")
    for path, words in ((cut, ["an undamaged file"]), (foreign, ["line 2", "not utf-8"])):
        assert main(["sasrec", "--source", str(path), "--out", str(tmp_path / "out")]) == 3
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(path) in said and all(word in said for word in words), said
    assert not list((tmp_path / "out").iterdir())


def test_make_shards_accepts_the_tables(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", ML_1M, "latin-1"), tmp_path / "out"
    more = "".join(f"{user}::{item}::4::97830300{user}\n" for item in (11, 10, 11) for user in (1, 2))
    (source / "ratings.dat").write_text(ML_1M["ratings.dat"] + more)
    assert main(["movielens-1m", "--source", str(source), "--out", str(out)]) == 0
    data = {
        "dir": str(tmp_path / "dataset"),
        "title": "title",
        "query": {
            "history": {"type": "history", "of": "item_id", "max_items": 5},
            "occupation": {"type": "categorical"},
            "age": {"type": "numeric"},
        },
        "doc": {
            "item_id": {"type": "categorical"},
            "genres": {"type": "categorical", "multi": True, "separator": "|"},
            "year": {"type": "numeric"},
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}, "data": data}))
    files = [word for name in ("interactions", "items", "users") for word in (f"--{name}", str(out / f"{name}.tsv"))]
    assert make_shards(["interactions", "--config", str(config), *files]) == 0
    schema = Schema.load(tmp_path / "dataset")
    assert sorted(schema.doc["genres"].vocabulary) == ["Comedy", "Drama", "Romance"]
    assert sorted(schema.query["occupation"].vocabulary) == ["K-12 student", "self-employed"]
    assert not (tmp_path / "dataset" / "quarantine.jsonl").read_text()


def test_build_dependencies_become_pairs_of_packages(tmp_path: Path, capsys: Any) -> None:
    about = [{"package": name, "synopsis": f"about {name}", "description": "a\nb", "section": "libs"} for name in "abc"]
    files = {
        "build_depends.tsv.xz": "s1\ta b x\ns2\tb a\ns3\ta c\n" + "".join(f"t{n}\tc\n" for n in range(600)),
        "packages.jsonl": "".join(json.dumps(package) + "\n" for package in about),
    }
    source = write(tmp_path / "in", files)
    assert main(["debian-build-depends", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    made = tables(tmp_path / "out")[
        "pairs"
    ]  # dropped: (a, c) of one source only, x without a description, the common c
    assert [sorted(row.split("\t")[:4:3]) for row in made[1:]] == [["a", "b"]]
    assert "about a. a b\tlibs" in made[1] and len(made[1].split("\t")) == 6
    assert "1 pairs\nnote: 1 packages that more than one source in 200 needs" in capsys.readouterr().out
    write(tmp_path / "in", {"packages.jsonl": '{"package": "a"}\n'})
    assert main(["debian-build-depends", "--source", str(source), "--out", str(tmp_path / "out")]) != 0
    assert "line 1" in capsys.readouterr().err
