#!/bin/sh
# Train and evaluate the first stage of the study, seed by seed: sh docs/study/run.sh TRAIN_IMAGES TEST_IMAGES RUNS_DIR
# Each run is taken by one of these only, so that several can share a machine.
# SEEDS="0 1 2 3 4" and STEPS=1500 may be set in the environment.
set -eu
train=$1 test=$2 runs=$3
mkdir -p "$runs"

one() {
    name=$1
    shift
    mkdir "$runs/.$name" 2>/dev/null || return 0  # taken
    fmrun train "$@" --data "$train" --steps "${STEPS:-1500}" --name "$name" --runs-dir "$runs" \
        -s log.sample_every=500 -s checkpoint.every=300 -s checkpoint.keep_every=300 -s eval.kid_every=0 || return 0
    fmrun eval "$name" --runs-dir "$runs" --all-checkpoints --num 2000 --data "$test"
}

for seed in ${SEEDS:-0 1 2 3 4}; do
    one "plain-seed$seed" --preset dcgan --seed "$seed"
    one "raw-sample-0.1-seed$seed" --preset dcgan-fm-mse --lambda-feature 0.1 --seed "$seed"
    for share in 0.1 1; do
        for match in sample mean moments mmd sliced; do
            one "$match-$share-seed$seed" --preset dcgan-fm --lambda-feature "$share" \
                -s "feature_matching.match=$match" --seed "$seed"
        done
    done
done
