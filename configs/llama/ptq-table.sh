#!/bin/bash
# Perplexity of a language model rounded by each method at 4, 3 and 2 bits, per row and in groups.
#
#   bash configs/llama/ptq-table.sh MODEL CALIBRATION TEXT OUT [GROUP_SIZE]
#
# Runs go to OUT, the table to OUT/table.json. Started again, it goes on where it was interrupted.
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
            [ $method = lapq ] && options+=(--samples $((samples < 8 ? samples : 8)) --evaluations "$evaluations")
            [ $method = lapq ] || options+=(--samples "$samples")
            stableqat ptq "$model" "${options[@]}"
        done
    done
done
rm -f "$out/table.json"
stableqat evaluate "$model" "$out"/*-[234]-* --data "$text" --documents blank-line --block_size "$block" \
    --out "$out/table.json"
