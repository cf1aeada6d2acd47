#!/bin/bash
# Perplexity of a language model rounded by each method at 4, 3 and 2 bits, per row and in groups.
#
#   bash configs/llama/ptq-table.sh MODEL CALIBRATION TEXT OUT [GROUP_SIZE]
#
# Runs go to OUT, tables to OUT/table-BITS.json. Started again, it goes on where it was interrupted.
# SAMPLES and BLOCK set the rows of calibration, EVALUATIONS how long LAPQ searches, on 8 of the rows.
set -e
model=$1 calibration=$2 text=$3 out=$4 group=${5:-128}
block=${BLOCK:-2048} samples=${SAMPLES:-128} evaluations=${EVALUATIONS:-1000}
for bits in 4 3 2; do
    for size in row "$group"; do
        for method in rtn mse gptq lapq; do
            run=$out/$method-$bits-$size
            [ -d "$run" ] && continue
            options=(--method $method --bits $bits --out "$run" --data "$calibration" --block_size "$block")
            [ "$size" = row ] || options+=(--group_size "$size")
            if [ $method = lapq ]; then
                options+=(--samples $((samples < 8 ? samples : 8)) --batch_size 4 --evaluations "$evaluations")
            else
                options+=(--samples "$samples")
            fi
            stableqat ptq "$model" "${options[@]}"
        done
    done
    [ -e "$out/table-$bits.json" ] && continue
    rm -f "$out/unfinished.json"
    stableqat evaluate "$model" "$out"/*-$bits-* --data "$text" --documents blank-line \
        --block_size "$block" --out "$out/unfinished.json"
    mv "$out/unfinished.json" "$out/table-$bits.json"
done
