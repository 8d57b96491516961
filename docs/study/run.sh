#!/bin/sh
# Train and evaluate the runs of the study, seed by seed: sh docs/study/run.sh TRAIN_IMAGES TEST_IMAGES RUNS_DIR
# Each run is taken by one of these only, so that several can share a machine.
# SEEDS="0 1 2 3 4" and STEPS=1500 may be set in the environment.
set -eu
train=$1 test=$2 runs=$3
mkdir -p "$runs/fashion-mnist" "$runs/stacked"

# one FOLDER NAME DATA EVALUATION_DATA OPTIONS...
one() {
    folder=$runs/$1 name=$2 data=$3 reals=$4
    shift 4
    mkdir "$folder/.$name" 2>/dev/null || return 0  # taken
    fmrun train "$@" ${data:+--data "$data"} --steps "${STEPS:-1500}" --name "$name" --runs-dir "$folder" \
        -s log.sample_every=500 -s checkpoint.every=300 -s checkpoint.keep_every=300 -s eval.kid_every=0 || return 0
    fmrun eval "$name" --runs-dir "$folder" --step 900 --step 1500 --num 2000 ${reals:+--data "$reals"}
}

for seed in ${SEEDS:-0 1 2 3 4}; do
    one fashion-mnist "plain-seed$seed" "$train" "$test" --preset dcgan --seed "$seed"
    one fashion-mnist "raw-sample-0.1-seed$seed" "$train" "$test" \
        --preset dcgan-fm-mse --lambda-feature 0.1 --seed "$seed"
    for share in 0.1 1; do
        for match in sample mean moments mmd sliced; do
            one fashion-mnist "$match-$share-seed$seed" "$train" "$test" --preset dcgan-fm --lambda-feature "$share" \
                -s "feature_matching.match=$match" --seed "$seed"
        done
    done
done
for seed in ${SEEDS:-0 1 2 3 4}; do
    one stacked "plain-seed$seed" "" "" --preset dcgan-stacked --seed "$seed"
    for match in sample mean moments; do
        one stacked "$match-1-seed$seed" "" "" --preset dcgan-stacked-fm --lambda-feature 1 \
            -s "feature_matching.match=$match" --seed "$seed"
    done
done
