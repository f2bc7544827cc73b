#!/usr/bin/env bash
# Append a day, train, compare with the live model, and publish: a new collection if the new model is not worse.
#
#   bash launch/night.sh CONFIG LIVE DAY [key=value ...]
#
# CONFIG  its data.dir is the dataset; the run of the night is in runs/DAY
# LIVE    name of the live model, models/LIVE, of its collection in the store $URL, and of its vectors, vectors/LIVE
# DAY     name of the new partition, model and collection; tables: events-DAY.csv and items-DAY.csv, or .parquet
#
# The model is trained from the beginning on all partitions. To continue the live model instead, add
# pretrain.init=models/LIVE data.from_partition=DAY. A step that fails ends the night, and the live collection stays as
# it is; the same command continues a night that was interrupted. MARGIN is that of `bigdssm compare_models`.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1 live=$2 day=$3
shift 3
: "${URL:?needs the URL of the store, such as file://\$PWD/store}"
dataset=$(python -c 'import sys; from bigdssm.config import load_config; print(load_config(sys.argv[1]).data.dir)' "$config")

if [ ! -e "$dataset/partitions/$day" ]; then
    bigdssm make_shards interactions --config "$config" --append "$day" \
        --interactions events-"$day".* --items items-"$day".* \
        --split time --validation-fraction 0.1 --test-fraction 0.1
fi
bigdssm pretrain --config "$config" --resume auto run.dir="runs/$day" "$@"
verdict=0
bigdssm compare_models "models/$live" "runs/$day/pretrain/best" --data "$dataset" \
    ${MARGIN:+--margin "$MARGIN"} || verdict=$?
case $verdict in
0) # not worse: a new collection
    cp -rLT "runs/$day/pretrain/best" "models/$day"
    bigdssm embed --model "models/$day" --data "$dataset" --out "vectors/$day"
    bigdssm publish --vectors "vectors/$day" --data "$dataset" --to "$URL" --as "$day" --verify --switch
    ;;
10 | 11 | 12) # worse, undecided, or the same model: tonight's documents in the live collection
    bigdssm embed --model "models/$live" --data "$dataset" --since "vectors/$live" --out "vectors/$live"
    bigdssm publish --vectors "vectors/$live" --data "$dataset" --to "$URL" --as "$live" --verify
    ;;
*) exit "$verdict" ;;
esac
