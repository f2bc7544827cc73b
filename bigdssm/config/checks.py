"""What a config's values must be together; of one alone, `keys` says its bounds."""

from __future__ import annotations

from typing import Any

from bigdssm.config.keys import Config, DataConfig, LossConfig, ModelConfig, StageConfig, TowerConfig
from bigdssm.errors import ConfigError
from bigdssm.features import Feature
from bigdssm.features.history import histories_of
from bigdssm.utils.bounds import out_of_bounds
from bigdssm.utils.components import components_of
from bigdssm.utils.loss_options import LOSSES


def check_config(config: Config) -> None:
    """Raise ConfigError with one sentence on the first thing in `config` that cannot work."""
    for key, got, needed in out_of_bounds(config):
        raise ConfigError(f"{key}: got {got}, needs {needed}")
    data, engine = config.data, config.engine
    for key, value in (("run.dir", config.run.dir), ("data.dir", data.dir)):
        _require(bool(value.strip()), key, repr(value), "a folder")
    _require(bool(data.query), "data.query", "no features", "at least one feature")
    _require(bool(data.doc), "data.doc", "no features", "at least one feature")
    _check_sources(data)
    if data.siamese:
        _check_siamese(data, config.model)
    for key, needs_it in (
        ("engine.offload_optimizer=true", engine.offload_optimizer),
        ("engine.precision=bf16_pure", engine.precision == "bf16_pure"),
    ):
        _require(engine.zero_stage > 0 or not needs_it, "engine.zero_stage", 0, f"1, 2 or 3 with {key}")
    # Stage 3 gathers a layer's weights in hooks around it, of which a compiled layer knows nothing.
    _require(engine.zero_stage < 3 or not engine.compile, "engine.compile", "true", "false with engine.zero_stage=3")
    for key, part in components_of(config):
        part.check(key)
    if data.targets_per_row > 1:
        check_many_queries(f"data.targets_per_row={data.targets_per_row}", data, config.model)
    for side, features in (("query", data.query), ("doc", data.doc)):
        for name, feature in features.items():
            key = f"data.{side}.{name}"
            _require(key.count(".") == 2 and not key.endswith("."), key, "this name", "a feature's name without dots")
            feature.check(key, side, data.doc)
    stages: dict[str, StageConfig | None] = {"pretrain": config.pretrain, "sft": config.sft}
    for name, stage in stages.items():
        if stage is not None:
            _check_stage(name, stage, data)
            _check_loss(f"{name}.loss", stage.loss, config.model, engine.chunk_tokens)
            _require(
                data.exclude_seen or stage.loss.mask not in ("user", "past"), f"{name}.loss.mask", stage.loss.mask,
                "none or batch with data.exclude_seen=false: what a user met before may be a negative",
            )  # fmt: skip
            if stage.loss.columns == "catalogue":
                _check_catalogue_columns(f"{name}.loss", stage.loss, config.model, data)
    if config.model.beta == "scalar":
        fits = any(stage is not None and not LOSSES[stage.loss.name].relative for stage in stages.values())
        _require(fits, "model.beta", "scalar", "document or none without a sigmoid loss: in all others it cancels")


def check_many_queries(rows: str, data: DataConfig, model: ModelConfig) -> None:
    """Raise ConfigError where several queries of a row cannot come from one pass; `rows` says what rows they are."""
    histories, history = histories_of(data.query), model.query.history
    if not histories:
        return
    if not history.allows_many_queries:
        raise ConfigError(
            f"model.query.history.positions={history.positions} gives an item one position in a row, but with {rows} "
            "it is of another age to each of the row's queries; use relative"
        )
    check_pieces(data)
    lengths = {name: feature.max_items for name, feature in histories.items()}
    _require(
        len(set(lengths.values())) == 1, "data.query", f"histories of max_items {lengths}",
        f"one max_items with {rows}: a row's queries know the same items of each",
    )  # fmt: skip


def check_pieces(data: DataConfig) -> None:
    """Raise ConfigError where a history is too short for the first query of a row to have seen anything of it."""
    for name, feature in histories_of(data.query).items():
        _require(
            data.targets_per_row <= feature.max_items, "data.targets_per_row", data.targets_per_row,
            f"at most data.query.{name}.max_items={feature.max_items}: a row's queries have seen parts of one history",
        )  # fmt: skip


def _check_sources(data: DataConfig) -> None:
    if data.mixture:
        _require(data.webdataset is None, "data.webdataset", data.webdataset, "no mixture beside it")
        _require(
            data.from_partition is None, "data.from_partition", data.from_partition,
            "no mixture beside it; name partitions in the mixture",
        )  # fmt: skip


def _check_siamese(data: DataConfig, model: ModelConfig) -> None:
    declared = [[(name, _apart_from_column(f)) for name, f in side.items()] for side in (data.query, data.doc)]
    given = "with data.siamese=true:"
    for key, got, fits, needed in (
        (
            "data.query",
            list(data.query),
            declared[0] == declared[1],
            f"data.doc's features, columns apart, {given} one tower",
        ),
        ("data.title", data.title, data.title is None, f"null {given} documents are shown by their ids"),
        ("data.exclude_seen", data.exclude_seen, data.exclude_seen, f"true {given} a query is never its own answer"),
        ("data.webdataset", data.webdataset, data.webdataset is None, f"null {given} documents need a catalogue"),
        ("model.query", "another tower", model.query in (TowerConfig(), model.doc), f"none {given} model.doc is both"),
        ("model.share_text", True, not model.share_text, f"false {given} the whole tower is shared"),
    ):
        _require(fits, key, got, needed)


def _apart_from_column(feature: Feature) -> dict[str, Any]:
    return {key: value for key, value in feature.declaration().items() if key != "column"}


def _check_stage(name: str, stage: StageConfig, data: DataConfig) -> None:
    rows, lanes = stage.rows_global, data.lanes
    if rows % lanes:
        below, above = rows // lanes * lanes, (rows // lanes + 1) * lanes
        fix = f"use {below} or {above}" if below else f"use {above}"
        raise ConfigError(f"{name}.rows_global={rows} must be divisible by data.lanes={lanes}; {fix}")
    _require(stage.steps > 0 or stage.epochs > 0, f"{name}.epochs", stage.epochs, "above 0 where steps is 0")
    _require(stage.init is None or bool(stage.init.strip()), f"{name}.init", repr(stage.init), "a folder, or null")
    mining, negatives = stage.mining, stage.loss.negatives
    listed = stage.loss.distillation in ("kl", "margin_mse")
    _require(mining.first < mining.last, f"{name}.mining", f"[{mining.first}, {mining.last})", "first < last")
    for key, used, why in (
        ("mlp", bool(stage.loss.mlp), "which trains no vectors to search by"),
        ("cross_encoder", stage.loss.cross_encoder, "whose towers stay as they are, so that the same would be mined"),
    ):
        fits = not used or mining.every_steps == 0
        _require(fits, f"{name}.mining.every_steps", mining.every_steps, f"0 with {name}.loss.{key}, {why}")
    if mining.uniform:
        with_it = f"with {name}.mining.uniform=true"
        _require(negatives > 0, f"{name}.loss.negatives", negatives, f"at least 1 {with_it}")
        _require(mining.file is None, f"{name}.mining.file", mining.file, f"none {with_it}")
        _require(mining.every_steps == 0, f"{name}.mining.every_steps", mining.every_steps, f"0 {with_it}")
    if mining.file is None:
        room = mining.last - mining.first
        fits = mining.uniform or negatives <= room
        _require(fits, f"{name}.loss.negatives", negatives, f"at most the mining window's {room}")
        of_a_judge = f"{name}.mining.file, with a judge's scores"
        _require(not listed, f"{name}.loss.distillation", stage.loss.distillation, of_a_judge)
        margin = mining.teacher_margin
        _require(margin is None, f"{name}.mining.teacher_margin", margin, of_a_judge)
    else:
        _require(
            data.from_partition is None and not data.mixture, f"{name}.mining.file", mining.file,
            "no data.from_partition or data.mixture, which number the rows otherwise",
        )  # fmt: skip
        every = mining.every_steps
        _require(every == 0, f"{name}.mining.every_steps", every, f"0 with {name}.mining.file: nothing is mined then")
        _require(negatives > 0 or not listed, f"{name}.loss.negatives", negatives, "at least 1 with loss.distillation")
    _check_teacher(name, stage, data)


def _check_teacher(name: str, stage: StageConfig, data: DataConfig) -> None:
    """A teacher's vectors are found by the numbers of rows and documents, and compared over the batch's columns."""
    of_batch = stage.loss.distillation == "batch_kl"
    needed = f"a folder of bigdssm embed_teacher with {name}.loss.distillation=batch_kl, else none"
    _require((stage.teacher is not None) == of_batch, f"{name}.teacher", stage.teacher, needed)
    for where, got, only in (
        (f"{name}.loss.columns", stage.loss.columns, "batch"),
        (f"{name}.loss.mlp", list(stage.loss.mlp), []),
        (f"{name}.loss.cross_encoder", stage.loss.cross_encoder, False),
        ("data.webdataset", data.webdataset, None),
        ("data.from_partition", data.from_partition, None),
        ("data.mixture", list(data.mixture), []),
    ):
        _require(not of_batch or got == only, where, got, f"{only} with {name}.loss.distillation=batch_kl")


def _check_loss(key: str, loss: LossConfig, model: ModelConfig, chunk_tokens: int) -> None:
    known = f"one of {', '.join(map(repr, LOSSES))}, or a loss whose module is imported first (docs/extending.md)"
    _require(loss.name in LOSSES, f"{key}.name", loss.name, known)
    options = LOSSES[loss.name]
    over_all, directions = options.all_columns, options.directions
    _require(loss.in_batch or not over_all, f"{key}.in_batch", False, f"true for {loss.name}, over the whole batch")
    mined_or_batch = loss.in_batch or loss.negatives > 0
    _require(mined_or_batch, f"{key}.negatives", loss.negatives, "at least 1 where in_batch is false")
    fit = loss.direction in directions
    _require(fit, f"{key}.direction", loss.direction, f"{' or '.join(directions)}: {loss.name} has no other")
    uniform = loss.uniform_negatives
    _require(over_all or uniform == 0, f"{key}.uniform_negatives", uniform, f"0: {loss.name} takes no extra columns")
    if loss.sampling == "none":
        _require(loss.frequency == "counts", f"{key}.frequency", loss.frequency, "sampling=classic or corrected")
    else:
        _require(loss.in_batch, f"{key}.sampling", loss.sampling, "in_batch=true: it corrects in-batch documents")
    widths = loss.widths
    fit = len(set(widths)) == len(widths) and all(width < model.dim for width in widths)
    _require(fit, f"{key}.widths", list(widths), f"distinct numbers from 1 to {model.dim - 1}, below model.dim")
    if model.score == "cosine":
        _require(loss.norm_penalty == 0, f"{key}.norm_penalty", loss.norm_penalty, "0: model.score=cosine has norms 1")
    if loss.scorer is not None:
        of, got = (f"{key}.mlp", list(loss.mlp)) if loss.mlp else (f"{key}.cross_encoder", True)
        given = "name other than fps, in_batch=false and negatives: it scores documents given for each query"
        _require(not over_all and not loss.in_batch, of, got, given)
        _require(key == "sft.loss", of, got, "the stage sft: mining needs a model that can search")
        _require(loss.cross_encoder or chunk_tokens == 0, of, got, "engine.chunk_tokens=0: it sees both towers at once")
        _require(not loss.widths, of, got, "widths=[]: it takes vectors whole")
        _require(not (loss.cross_encoder and loss.mlp), of, got, "cross_encoder=false: one of them scores")
        _require(
            not loss.cross_encoder or loss.norm_penalty == 0, f"{key}.norm_penalty", loss.norm_penalty,
            "0 with cross_encoder=true: it has no vectors",
        )  # fmt: skip
    elif not options.relative:
        _require(model.beta == "scalar", "model.beta", model.beta, f"scalar where {key}.name is {loss.name}")


def _check_catalogue_columns(key: str, loss: LossConfig, model: ModelConfig, data: DataConfig) -> None:
    """Each document is a column once: nothing is sampled, and two ranks' vectors of a document must be the same."""
    over_all = LOSSES[loss.name].all_columns
    _require(over_all, f"{key}.columns", loss.columns, f"batch with {loss.name}, which is not over all columns")
    texts = {side: any(f.type == "text" for f in getattr(data, side).values()) for side in ("query", "doc")}
    encoder = "query" if model.share_text and texts["query"] else "doc"
    text_dropout = getattr(model, encoder).text.dropout if texts["doc"] else 0.0
    once = "every document is a column, once"
    same = "a document's vector must be the same on all ranks"
    for where, got, needed, why in (
        (f"{key}.direction", loss.direction, "q2d", "a document of no query has no term in its column"),
        (f"{key}.sampling", loss.sampling, "none", once),
        (f"{key}.uniform_negatives", loss.uniform_negatives, 0, once),
        (f"{key}.negatives", loss.negatives, 0, once),
        ("data.webdataset", data.webdataset or "none", "none", "rows that bring their documents have no catalogue"),
        ("model.doc.dropout", model.doc.dropout, 0.0, same),
        (f"model.{encoder}.text.dropout", text_dropout, 0.0, same),
    ):
        _require(got == needed, where, got, f"{needed} with {key}.columns=catalogue: {why}")


def _require(holds: bool, key: str, got: object, needed: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: got {got}, needs {needed}")
