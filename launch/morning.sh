#!/usr/bin/env bash
# Append new and changed items, withdraw others, and publish the changes in the live collection.
#
#   bash launch/morning.sh CONFIG LIVE NAME ITEMS [WITHDRAWN]
#
# CONFIG     its data.dir is the dataset
# LIVE       name of the live model, models/LIVE, of its collection in the store $URL, and of its vectors, vectors/LIVE
# NAME       name of the new partition
# ITEMS      table of new and changed items
# WITHDRAWN  table of the ids of items that are no longer sold
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1 live=$2 name=$3 items=$4 withdrawn=${5:-}
: "${URL:?needs the URL of the store, such as file://\$PWD/store}"
dataset=$(python -c 'import sys; from bigdssm.config import load_config; print(load_config(sys.argv[1]).data.dir)' "$config")

if [ ! -e "$dataset/partitions/$name" ]; then
    bigdssm make_shards items --config "$config" --append "$name" --items "$items" \
        ${withdrawn:+--withdrawn "$withdrawn"}
fi
bigdssm embed --model "models/$live" --data "$dataset" --since "vectors/$live" --out "vectors/$live"
bigdssm publish --vectors "vectors/$live" --data "$dataset" --to "$URL" --as "$live"
