"""Print the resolved, validated config of a run, or the JSON Schema of config files.

    bigdssm config --config configs/tldr.yaml [key=value …]
    bigdssm config --schema > config.schema.json

The output is a complete config file in YAML with all keys, including defaults. A config that `--validate` of a stage
would refuse is refused here, too, unless the reason is in the dataset. Editors complete and validate a config
file whose first line names the schema: `# yaml-language-server: $schema=config.schema.json`. The schema includes the
components of installed plugins.
"""

import argparse
import json

import yaml

from bigdssm.cli import command, one_of, option
from bigdssm.config import load_config
from bigdssm.config.components import STAGES
from bigdssm.config.schema import config_schema
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.utils.components import literal


@command(
    one_of(
        option("--config", metavar="FILE", help="YAML file to resolve and validate; see configs/"),
        option("--schema", action="store_true", help="print the JSON Schema of config files"),
    ),
    option("overrides", nargs="*", metavar="key=value", help="overrides of dotted config keys"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    if not args.schema:
        config = load_config(args.config, args.overrides)
        from bigdssm.training.checks import check_model, check_settings  # takes seconds

        if config.pretrain.init is None:
            check_model(config.model, Schema.declared(config.data).inputs, 1)
        for name in STAGES if config.sft else STAGES[:1]:
            check_settings(config, name)
        print(yaml.safe_dump(literal(config.to_dict()), sort_keys=False), end="")
        return
    if args.overrides:
        raise ConfigError(f"--schema takes no key=value, got {args.overrides[0]}; leave it out")
    print(json.dumps(config_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    raise SystemExit(main())
