"""Validation of a config as a whole; the bounds of single values are in `keys`."""

from dataclasses import fields

import numpy as np
import pyarrow as pa

from bigdssm.config.keys import (
    FEATURE_SIDES,
    SPLITS,
    Config,
    DataConfig,
    ModelConfig,
    StageConfig,
    StageName,
    TowerConfig,
)
from bigdssm.errors import ConfigError
from bigdssm.features import FIRST_CODE, Timestamp, age_of, texts_of
from bigdssm.features.base import filterable
from bigdssm.features.categorical import categorical_of
from bigdssm.features.conditions import check_features, parse_filter
from bigdssm.features.history import histories_of
from bigdssm.utils.components import components_of, require, require_all
from bigdssm.utils.urls import is_url, redacted


def check_config(config: Config) -> None:
    """Raise ConfigError for the first invalid value or conflict in `config`."""
    data, model, engine = config.data, config.model, config.engine
    partition, plain, histories = data.from_partition, data.webdataset, histories_of(data.query)
    require_all(
        (bool(config.run.dir.strip()), "run.dir", repr(config.run.dir), "a folder"),
        (
            not is_url(config.run.dir), "run.dir", redacted(config.run.dir),
            "a folder of a file system; bigdssm mirror_run copies a run to a URL and back",
        ),
        (bool(data.dir.strip()), "data.dir", repr(data.dir), "a folder"),
        (bool(data.query), "data.query", "no features", "at least one feature"),
        (bool(data.doc), "data.doc", "no features", "at least one feature"),
        (not data.mixture or plain is None, "data.webdataset", plain, "no mixture"),
        (
            not data.mixture or partition is None, "data.from_partition", partition,
            "no mixture; set the partitions in the mixture",
        ),
    )  # fmt: skip
    if data.siamese:
        _check_siamese(data, model)
    zero, pure = engine.zero_stage, engine.precision == "bf16_pure"
    require_all(
        (
            zero > 0 or not engine.offload_optimizer, "engine.zero_stage", 0,
            "1, 2 or 3 with engine.offload_optimizer=true",
        ),
        (zero > 0 or not pure, "engine.zero_stage", 0, "1, 2 or 3 with engine.precision=bf16_pure"),
        # Gradients of chunks would be added in bfloat16: their error grows with the number of chunks.
        (
            engine.chunk_tokens == 0 or not pure, "engine.chunk_tokens", engine.chunk_tokens,
            "0 with engine.precision=bf16_pure, which adds gradients in bfloat16; or engine.precision=bf16",
        ),
        # ZeRO stage 3 gathers a layer's weights in hooks, which a compiled layer does not call.
        (zero < 3 or not engine.compile, "engine.compile", "true", "false with engine.zero_stage=3"),
    )  # fmt: skip
    for key, part in components_of(config):
        part.check(key)
    if model.share_text and all(texts_of(side) for side in (data.query, data.doc)):
        doc, query, default = model.doc.text, model.query.text, TowerConfig().text
        for f in fields(doc):
            value, used = getattr(doc, f.name), getattr(query, f.name, f.default)
            require(
                value in (used, getattr(default, f.name, f.default)), f"model.doc.text.{f.name}", value,
                f"{used}, as model.query.text, with model.share_text=true: one text encoder reads both sides",
            )  # fmt: skip
    if data.targets_per_row > 1:
        check_many_queries(f"data.targets_per_row={data.targets_per_row}", data, model)
    for side in FEATURE_SIDES:
        for name, feature in getattr(data, side).items():
            key = f"data.{side}.{name}"
            require(key.count(".") == 2 and not key.endswith("."), key, "this name", "a feature name without dots")
            feature.check(key, side, data.doc)
    hashed = {name for name, feature in categorical_of(data.filter).items() if feature.hash_buckets}
    for name, feature in data.filter.items():
        got, needed = feature.type + " with hash_buckets" * (name in hashed), "categorical without them, or numeric"
        require(name in filterable(data.filter).keys() - hashed, f"data.filter.{name}", got, needed)
        require(name not in data.doc, f"data.filter.{name}", "the name of a feature of data.doc", "another name")
    times = [f"data.event.{name}" for name, feature in data.event.items() if isinstance(feature, Timestamp)]
    by_time, unknown = model.query.history.times, sorted(set(data.request) - set(data.event))
    repeated = sorted({name for name in data.request if data.request.count(name) > 1})
    has_splits = data.targets is None or (isinstance(data.targets, dict) and set(data.targets) <= set(SPLITS))
    require_all(
        (not (data.filter and data.siamese), "data.filter", list(data.filter), "none with data.siamese=true"),
        (not data.filter or plain is None, "data.filter", list(data.filter), "none with data.webdataset"),
        (len(times) <= 1, "data.event", f"{len(times)} features of type timestamp, {', '.join(times)}", "one"),
        (
            by_time == "none" or bool(times), "model.query.history.times", by_time,
            "a feature of data.event of type timestamp",
        ),
        (not repeated, "data.request", f"{', '.join(repeated)} more than once", "each feature once"),
        (not unknown, "data.request", ", ".join(unknown), f"features of data.event, of {list(data.event)}"),
        (not data.request or "request" not in data.query, "data.query", "a feature named request", "another name"),
        (bool(data.request) or data.ties == "exclude", "data.ties", data.ties, "exclude without data.request"),
        (has_splits, "data.targets", data.targets, f"a condition, or a mapping of {', '.join(SPLITS)} to conditions"),
    )  # fmt: skip
    conditions = {f"data.targets.{split}": text for split, text in (data.targets or {}).items()}
    if not isinstance(data.exclude_seen, bool):
        conditions["data.exclude_seen"] = data.exclude_seen
    for key, text in conditions.items():
        others = "true, false or " if key == "data.exclude_seen" else ""
        require(isinstance(text, str), key, text, f"{others}a condition, as in action = purchase")
        check_features(parse_filter(text, key), data.event, f"{key} {text!r}")
    visit, sessions = data.visit, [name for name, feature in data.event.items() if not feature.is_input]
    if visit.funnel:
        _check_funnel(data)
    if visit.is_set:
        given = {key: value for key in ("feature", "gap_s") if (value := getattr(visit, key)) is not None}
        require_all(
            (len(given) == 1, "data.visit", given, "feature or gap_s, not both"),
            (
                visit.feature is None or visit.feature in sessions, "data.visit.feature", visit.feature,
                f"a feature of data.event of type session, of {sessions}",
            ),
            (bool(histories), "data.visit", given, "a query feature of type history"),
            (plain is None, "data.visit", given, "none with data.webdataset"),
        )  # fmt: skip
    wrong = sorted(set(data.request) & set(sessions))
    require(not wrong, "data.request", ", ".join(wrong), "features that are inputs of a model, not sessions")
    age = age_of(data.doc)
    if age is not None:
        key = "data.doc with a feature of type age"
        requested = [name for name in data.request if isinstance(data.event.get(name), Timestamp)]
        require_all(
            (
                bool(requested), key, f"data.request={list(data.request)}",
                "a feature of data.event of type timestamp in it",
            ),
            (model.score == "dot", "model.score", model.score, "dot with a feature of data.doc of type age"),
            (
                model.dim > age.width, "model.dim", model.dim,
                f"more than {age.width}, of which data.doc has two for each period of its feature of type age",
            ),
        )  # fmt: skip
    if data.event:
        needed = "a query feature of type history, which reads the events"
        require(bool(histories), "data.event", list(data.event), needed)
        require(plain is None, "data.event", list(data.event), "none with data.webdataset")
        for name, feature in data.event.items():
            require(
                pa.types.is_primitive(feature.arrow_type()), f"data.event.{name}", f"type {feature.type} with a list",
                "one value per event: categorical without multi, numeric, elapsed or calendar",
            )  # fmt: skip
    if model.query.history.items != "id":
        ids = {feature.of for feature in histories.values()}
        require(
            bool(ids) and set(data.doc) > ids, "model.query.history.items", model.query.history.items,
            "id without a history, and another feature of data.doc, which is an item's content",
        )  # fmt: skip
    transition = model.query.history.transition
    if transition is not None:
        actions = [name for name, f in categorical_of(data.event).items() if not f.multi and not f.hash_buckets]
        require(
            bool(histories) and transition in actions, "model.query.history.transition", transition,
            f"a query feature of type history, and a categorical feature of data.event with a vocabulary, of {actions}",
        )  # fmt: skip
    _check_tables(config)
    names: tuple[StageName, ...] = ("pretrain",) if config.sft is None else ("pretrain", "sft")
    for name in names:
        _check_stage(name, config)


def _check_funnel(data: DataConfig) -> None:
    """Raise ConfigError if data.visit.funnel does not name the steps of one feature of events."""
    key, funnel = "data.visit.funnel", data.visit.funnel
    features = {name: f for name, f in categorical_of(data.event).items() if not (f.multi or f.hash_buckets)}
    name = data.visit.action
    steps = funnel[name] if name is not None else ()
    require_all(
        (data.visit.is_set, key, funnel, "visits: set data.visit.gap_s or data.visit.feature, too"),
        (len(funnel) == 1, key, f"{len(funnel)} features, {', '.join(funnel)}", "one"),
        (
            name in features, key, name,
            f"a categorical feature of data.event, without hash_buckets, of {list(features)}",
        ),
        (
            len(steps) > 0 and len(set(steps)) == len(steps), f"{key}.{name}", list(steps),
            "at least one value, and each once, from the first step to the last",
        ),
    )  # fmt: skip


def _can_start_from_chain(config: Config) -> bool:
    """Return whether both towers add transitions and items, whose products a chain has, to their other outputs."""
    model, histories = config.model, histories_of(config.data.query)
    if model.query.history.transition is None or model.query.residual not in histories or len(histories) > 1:
        return False
    return model.score == "dot" and model.doc.residual == histories[model.query.residual].of


def check_many_queries(rows: str, data: DataConfig, model: ModelConfig) -> None:
    """Raise ConfigError if one pass cannot encode several queries per row; `rows` is the setting in messages."""
    histories, history = histories_of(data.query), model.query.history
    if not histories:
        return
    if not history.allows_many_queries:
        raise ConfigError(
            f"model.query.history.positions={history.positions} has one position per item of a row, but with {rows} "
            "an item's age differs between the row's queries; use relative, rotary or none"
        )
    check_history_lengths(data)
    lengths = {name: feature.max_items for name, feature in histories.items()}
    require(
        len(set(lengths.values())) == 1, "data.query", f"histories of max_items {lengths}",
        f"one max_items with {rows}: all histories of a query have the same items",
    )  # fmt: skip


def check_history_lengths(data: DataConfig) -> None:
    """Raise ConfigError if a history is shorter than the number of targets per row."""
    for name, feature in histories_of(data.query).items():
        require(
            data.targets_per_row <= feature.max_items, "data.targets_per_row", data.targets_per_row,
            f"at most data.query.{name}.max_items={feature.max_items}: a row's queries share one history",
        )  # fmt: skip


def _check_siamese(data: DataConfig, model: ModelConfig) -> None:
    declared = [
        [(name, {key: value for key, value in feature.declaration().items() if key != "column"})
         for name, feature in side.items()]
        for side in (data.query, data.doc)
    ]  # fmt: skip
    siamese = "with data.siamese=true:"
    require_all(
        (
            declared[0] == declared[1], "data.query", list(data.query),
            f"the same features as data.doc (columns may differ) {siamese} one tower encodes both",
        ),
        (data.title is None, "data.title", data.title, f"null {siamese} documents are displayed by id"),
        (
            data.exclude_seen is True, "data.exclude_seen", data.exclude_seen,
            f"true {siamese} a query is never its own result",
        ),
        (data.webdataset is None, "data.webdataset", data.webdataset, f"null {siamese} documents need a catalogue"),
        (
            model.query in (TowerConfig(), model.doc), "model.query", "another tower",
            f"none {siamese} model.doc is used for both",
        ),
        (not model.share_text, "model.share_text", True, f"false {siamese} the whole tower is shared"),
    )  # fmt: skip


def _check_stage(name: StageName, config: Config) -> None:
    """Raise ConfigError for the first conflict of a stage's keys."""
    data, stage = config.data, config.stage(name)
    rows, lanes = stage.rows_global, data.lanes
    if rows % lanes:
        below, above = rows // lanes * lanes, (rows // lanes + 1) * lanes
        fix = f"use {below} or {above}" if below else f"use {above}"
        raise ConfigError(f"{name}.rows_global={rows} must be divisible by data.lanes={lanes}; {fix}")
    documents, model, loss, key = stage.documents, config.model, stage.loss, f"{name}.loss"
    vectors, widths = f"model={documents.model}, vectors={documents.vectors}", loss.widths or ()
    both = (documents.model is None) == (documents.vectors is None)
    fixed = f"with {name}.documents.model, whose document tower is not trained"
    is_trained = documents.model is None
    of_age = age_of(data.doc) is not None
    fit = len(set(widths)) == len(widths) and all(width < model.dim for width in widths)
    require_all(
        (stage.steps > 0 or stage.epochs > 0, f"{name}.epochs", stage.epochs, "above 0 if steps is 0"),
        (stage.init is None or bool(stage.init.strip()), f"{name}.init", repr(stage.init), "a folder, or null"),
        (both, f"{name}.documents", vectors, "both, or neither"),
        (
            not stage.warm_start.chain or _can_start_from_chain(config), f"{name}.warm_start.chain", True,
            "model.query.history.transition, model.query.residual (the history), model.doc.residual (its items) "
            "and model.score=dot",
        ),
        (is_trained or not data.siamese, "data.siamese", data.siamese, f"false {fixed}"),
        (is_trained or data.webdataset is None, "data.webdataset", data.webdataset, f"null {fixed}"),
        (is_trained or not model.share_text, "model.share_text", model.share_text, f"false {fixed}"),
        (
            not stage.refresh_contents_every_steps or model.query.history.items != "id",
            f"{name}.refresh_contents_every_steps", stage.refresh_contents_every_steps,
            "0 with model.query.history.items=id: histories read no contents",
        ),
        (fit, f"{key}.widths", list(widths), f"distinct numbers from 1 to {model.dim - 1}, below model.dim"),
        (
            not (widths and of_age), f"{key}.widths", list(widths),
            "none with a feature of data.doc of type age: its dimensions are the last ones",
        ),
    )  # fmt: skip

    _check_negatives(name, stage, config)
    for component in (stage.loss, stage.sampling, stage.distillation):
        if component is not None:
            component.check_in_stage(name, config)


def _check_tables(config: Config) -> None:
    """Raise ConfigError: `model.tables` has a name of no categorical feature, or a table is too large to replicate."""
    tables, data = config.model.tables, config.data
    sides = {"query": data.query, "doc": data.doc, "event": data.event}
    named = {f"{side}.{name}" for side, features in sides.items() for name in categorical_of(features)}
    for key, names in (("rows", tables.rows), ("replicated", tables.replicated)):
        wrong = sorted(set(names) - named)
        require(not wrong, f"model.tables.{key}", ", ".join(wrong), f"categorical features, of {sorted(named)}")
    for side, features in sides.items():
        for name, feature in categorical_of(features).items():
            is_sharded = tables.is_sharded(side, name, feature.num_codes)
            is_allowed = is_sharded or feature.num_codes <= np.iinfo(np.int32).max
            require(
                is_allowed or (data.siamese and side == "query"),
                f"data.{side}.{name}.hash_buckets", feature.hash_buckets,
                f"at most {np.iinfo(np.int32).max - FIRST_CODE:,} with a replicated table; shard it by "
                f"model.tables.rows=[{side}.{name}]",
            )  # fmt: skip
    hashed = any(feature.hash_buckets for features in sides.values() for feature in categorical_of(features).values())
    both = sorted(set(tables.rows) & set(tables.replicated))
    require_all(
        (
            tables.hashes == 1 or tables.hash_rows > 0, "model.tables.hash_rows", 0,
            f"above 0 with hashes={tables.hashes}",
        ),
        (
            hashed or not tables.hash_rows, "model.tables.hash_rows", tables.hash_rows,
            "0 without a categorical feature with hash_buckets, whose ids share the rows",
        ),
        (not both, "model.tables.rows", ", ".join(both), "other features than model.tables.replicated"),
    )  # fmt: skip


def _check_negatives(name: StageName, stage: StageConfig, config: Config) -> None:
    loss, negatives, mining, data = stage.loss, stage.negatives, stage.negatives.mining, config.data
    key, over_all = f"{name}.negatives", loss.all_columns
    has_negatives = negatives.in_batch or negatives.hard > 0
    needs_seen = negatives.mask == "user" or (negatives.mask == "past" and not data.visit.is_set)
    unsupported = f"0: {loss.name} does not support"
    require_all(
        (negatives.in_batch or not over_all, f"{key}.in_batch", False, f"true for {loss.name}, over the whole batch"),
        (has_negatives, f"{key}.hard", negatives.hard, "at least 1 if in_batch is false"),
        (over_all or not negatives.uniform, f"{key}.uniform", negatives.uniform, f"{unsupported} uniform negatives"),
        (
            bool(data.exclude_seen) or not needs_seen, f"{key}.mask", negatives.mask,
            "none or batch with data.exclude_seen=false: a user's earlier items may be negatives",
        ),
        (mining.first < mining.last, f"{key}.mining", f"[{mining.first}, {mining.last})", "first < last"),
    )  # fmt: skip
    every = mining.every_steps
    if mining.uniform:
        setting = f"with {key}.mining.uniform=true"
        require_all(
            (negatives.hard > 0, f"{key}.hard", negatives.hard, f"at least 1 {setting}"),
            (mining.file is None, f"{key}.mining.file", mining.file, f"none {setting}"),
            (every == 0, f"{key}.mining.every_steps", every, f"0 {setting}"),
        )
    if mining.file is None:
        window, margin = mining.last - mining.first, mining.teacher_margin
        is_allowed = mining.uniform or negatives.hard <= window
        require(is_allowed, f"{key}.hard", negatives.hard, f"at most {window}, the size of the mining window")
        require(margin is None, f"{key}.mining.teacher_margin", margin, f"{key}.mining.file, with a teacher's scores")
    else:
        require(
            data.from_partition is None and not data.mixture, f"{key}.mining.file", mining.file,
            "no data.from_partition or data.mixture, which change the row numbers",
        )  # fmt: skip
        require(every == 0, f"{key}.mining.every_steps", every, f"0 with {key}.mining.file, which replaces mining")
    if negatives.columns == "catalogue":
        _check_catalogue_columns(name, stage, config)


def _check_catalogue_columns(name: StageName, stage: StageConfig, config: Config) -> None:
    """Raise ConfigError unless each document is exactly one column, with the same vector on all ranks."""
    model, data, loss, negatives = config.model, config.data, stage.loss, stage.negatives
    key = f"{name}.negatives.columns"
    require(
        loss.all_columns,
        key,
        negatives.columns,
        f"batch with {loss.name}, which is not computed over the whole score matrix",
    )
    texts = {side: any(f.type == "text" for f in getattr(data, side).values()) for side in ("query", "doc")}
    encoder = "query" if model.share_text and texts["query"] else "doc"
    text_dropout = getattr(model, encoder).text.dropout if texts["doc"] else 0.0
    once = "every document is exactly one column"
    same = "a document's vector must be the same on all ranks"
    for where, got, needed, why in (
        (f"{name}.loss.direction", loss.direction, "q2d", "a document without a query has no term in its column"),
        (f"{name}.sampling.name", stage.sampling.name, "none", once),
        (f"{name}.negatives.uniform", negatives.uniform, 0, once),
        (f"{name}.negatives.hard", negatives.hard, 0, once),
        ("data.webdataset", data.webdataset or "none", "none", "rows that contain their documents have no catalogue"),
        ("model.doc.dropout", model.doc.dropout, 0.0, same),
        (f"model.{encoder}.text.dropout", text_dropout, 0.0, same),
    ):
        require(got == needed, where, got, f"{needed} with {key}=catalogue: {why}")
