"""The JSON Schema of a run's YAML, generated from the dataclasses: types, defaults, bounds, comments.

A value may also be an OmegaConf interpolation: strings are restricted by a pattern, and every value may be a string;
the keywords for objects, lists and numbers do not apply to strings.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from bigdssm.config.keys import Config
from bigdssm.utils.components import BOUND, EACH, MISSING, REGISTRY, Bound, Registry, default_of

Schema = dict[str, Any]

OPEN: Schema = {"$ref": "#/$defs/interpolation"}
INTERPOLATION: Schema = {
    "description": "An OmegaConf interpolation, or ??? for a value given on the command line.",
    "pattern": r"\$\{|^\?\?\?$",
}
COMMENT = re.compile(r"(?:^|\s)# *(.*)")  # no default or bound contains a # after a space
NUMBERS = {bool: "boolean", int: "integer", float: "number"}
LIMITS = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}


def config_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a run's YAML, with the components of every imported plugin."""
    sections: dict[str, Schema] = {"interpolation": INTERPOLATION}
    root = _object(Config, sections)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", **root, "$defs": sections}


def comments(cls: type) -> dict[str, str]:
    """Return the comment per field of a dataclass and of its bases: the lines above it, those within and after it."""
    result = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class of a console or notebook has no source file
            continue
        lines = source.splitlines()
        for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno - 1
                while lines[first - 1].lstrip().startswith("#"):
                    first -= 1
                matches = (COMMENT.search(line) for line in lines[first : node.end_lineno])
                result[node.target.id] = " ".join(match[1] for match in matches if match)
    return result


def _object(cls: Any, sections: dict[str, Schema]) -> Schema:
    """Return the schema of a dataclass; `sections` collects the definitions of nested dataclasses."""
    hints, descriptions = get_type_hints(cls), comments(cls)
    properties: dict[str, Any] = {}
    required = []
    for field in fields(cls):
        if field.metadata.get("fitted"):
            continue
        default = default_of(field)
        hint = hints[field.name]
        if EACH in field.metadata:
            block = _component(field.metadata[EACH], None, sections)
            schema = {**_open("object"), "additionalProperties": block}
        elif REGISTRY in field.metadata:
            block = _component(field.metadata[REGISTRY], default, sections)
            schema = _or_null(block) if NoneType in get_args(hint) else block
        else:
            schema = _value(hint, field.metadata.get(BOUND), sections)
        section = sections.get(str(schema.get("$ref")).rpartition("/")[2], {})
        if default == MISSING or "required" in section:
            required.append(field.name)
        elif not is_dataclass(default):
            schema["default"] = list(default) if isinstance(default, tuple) else default
        if descriptions.get(field.name):
            schema["description"] = descriptions[field.name]
        properties[field.name] = schema
    needs = {"required": required} if required else {}
    return {"description": inspect.getdoc(cls), "properties": properties, **needs, "additionalProperties": False}


def _component(registry: Registry[Any], default: Any, sections: dict[str, Schema]) -> Schema:
    """Return the schema of a component's block: the selector, and the keys of the selected component."""
    selector, usual = registry.selector, getattr(default, registry.selector, None)
    names: list[Schema] = []
    cases = []
    for name in registry.names():
        keys = _object(registry.classes[name], sections)
        keys["properties"][selector] = True
        named = {} if name == usual else {"required": [selector]}
        cases.append({"if": {"properties": {selector: {"const": name}}, **named}, "then": keys})
        names.append({"const": name, "description": keys["description"]})
    selected: Schema = {"anyOf": [*names, {"type": "string", **OPEN}]}
    needs = {"required": [selector]} if usual is None else {}
    if usual is not None:
        selected["default"] = usual
    return {**_open("object"), "properties": {selector: selected}, **needs, "allOf": cases}


def _value(hint: Any, bound: Bound | None, sections: dict[str, Schema]) -> Schema:
    """Return the schema of a type, with a bound for numbers."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        kinds = [_value(option, bound, sections) for option in inner if option is not NoneType]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        return _or_null(schema) if NoneType in inner else schema
    if kind is Literal:
        return {"anyOf": [{"enum": list(inner)}, {"type": "string", **OPEN}]}
    if kind is str:
        return {"type": ["string"]}
    if kind in NUMBERS:
        limits = {LIMITS[f.name]: getattr(bound, f.name) for f in fields(bound)} if bound else {}
        return {**_open(NUMBERS[kind]), **{name: limit for name, limit in limits.items() if limit is not None}}
    if kind in (list, tuple) and inner[1:] in ((), (...,)):
        return {**_open("array"), "items": _value(inner[0], bound, sections)}
    if kind is tuple:
        items = [_value(one, bound, sections) for one in inner]
        return {**_open("array"), "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if isinstance(kind, type) and is_dataclass(kind):
        name = kind.__name__
        if name not in sections:
            sections[name] = {**OPEN, **_object(kind, sections)}
        return {"type": ["object", "string"], "$ref": f"#/$defs/{name}"}
    return _open("object") if kind is dict else {}  # Any


def _open(kind: str) -> Schema:
    """Return the schema of a type or an interpolation."""
    return {"type": [kind, "string"], **OPEN}


def _or_null(schema: Schema) -> Schema:
    if "type" in schema:
        return {**schema, "type": [*schema["type"], "null"]}
    return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
