#!/bin/sh
# CIFAR100-LT of ratio 100, all steps with a generator and a CLIP of our own (docs/cifar100_lt.md).
#
#   sh recipes/cifar100_lt/own_generator.sh assets                 generator and CLIP, from scratch
#   sh recipes/cifar100_lt/own_generator.sh spectrum               hard images, prompts, spectrum, filter, distances
#   sh recipes/cifar100_lt/own_generator.sh train LOSS CURRICULUM SEED [further flags of train_lt.py]
#
# Each stage ends within MINUTES; one that is not done ends with exit code 75: run the same command again to resume.
# DATASET: cifar100_lt, or cifar100_lt_20 for every fifth class. DATA: CIFAR-100 as train_lt.py reads it. OUT: where
# everything goes. SIZES: row of make_assets.py's table. SEEDS: images of each source and level. SHARE_OF: the filter's.
set -eu
cd "$(dirname "$0")/../.."
DATASET=${DATASET:-cifar100_lt} DATA=${DATA:-cifar100.zip} OUT=${OUT:-runs/cifar100} SIZES=${SIZES:-cifar100_lt_gpu} SEEDS=${SEEDS:-8}
SHARE_OF=${SHARE_OF:-class-level} MINUTES=${MINUTES:-9} PYTHON=${PYTHON:-python}
data="--dataset $DATASET --imb-ratio 100 --data-root $DATA"

# timeout leaves with 124 after the SIGTERM that the script has answered with a checkpoint
limited() { timeout "${MINUTES}m" "$@" || { code=$?; [ $code = 124 ] && code=75; exit $code; }; }

case $1 in
assets)
    $PYTHON assets/make_assets.py --benchmark "$DATASET" --data-root "$DATA" --sizes "$SIZES" --minutes "$MINUTES" --out "$OUT/assets"
    ;;
spectrum)
    $PYTHON find_hard.py $data --out "$OUT/hard.csv"
    # the caption that this CLIP learnt; the paper's "a photo of X" is for OpenAI's
    $PYTHON write_prompts.py --dataset "$DATASET" --hard "$OUT/hard.csv" --out "$OUT/prompts.json" \
        --score-prompt "a photo of a {}"
    limited $PYTHON generate_spectrum.py $data --hard "$OUT/hard.csv" --prompts "$OUT/prompts.json" --out "$OUT/spectrum" \
        --generator "$OUT/assets/tiny_sd" --levels 0 30 50 70 90 --seeds "$SEEDS" --steps 20 --text-guidance 3 \
        --size source --batch-size 256
    # The share that the paper's threshold keeps: the threshold itself, 0.3, is of another CLIP. Of each class and level,
    # because this one gives some classes lower scores than others.
    limited $PYTHON filter_clipscore.py $data --prompts "$OUT/prompts.json" --spectrum "$OUT/spectrum" \
        --clip "$OUT/assets/tiny_clip" --keep-share 0.312 --share-of "$SHARE_OF" --distance
    ;;
train)
    loss=$2 curriculum=$3 seed=$4
    shift 4
    [ "$curriculum" = none ] || set -- --spectrum "$OUT/spectrum" "$@"
    limited $PYTHON train_lt.py $data --loss "$loss" --curriculum "$curriculum" --seed "$seed" \
        --out "$OUT/${loss}_$curriculum/seed$seed" "$@"
    ;;
*)
    echo "own_generator.sh: expected assets, spectrum or train, not $1" >&2
    exit 2
    ;;
esac
