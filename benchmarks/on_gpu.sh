#!/usr/bin/env bash
# What to do with a quarter of an hour on a GPU: the tests that fail there by name, the rows that are missing, the lessons.
#
#   bash benchmarks/on_gpu.sh                  all three, in the folder ./gpu (OUT=...)
#   bash benchmarks/on_gpu.sh records          one of tests, records, lessons
#   MEMORY="default all_nf4_wo" SPEED="eager best" RECORDS=400 bash benchmarks/on_gpu.sh records
#
# Run it in the project's folder, with sd3kit and its test tools installed (PYTHON=... names which Python). Seconds for
# each part: TESTS, RECORDS, LESSONS. Nothing is downloaded: the model is SD3 Medium's true size with random weights
# (MODEL=3.5-medium or 3.5-large for another). What was measured is kept when the time is up, and the same command goes
# on; the first row of each study stands beside those of other machines. Then copy gpu/*.jsonl to sd3kit/results/. All
# parts run whatever comes of them; the exit code is 1 where one failed or was not done in its time, and its name is said.
set -uo pipefail
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-gpu} MODEL=${MODEL:-medium}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
MEMORY=${MEMORY:-default encoders_offload_stream_tiled encoders_stream_nf4_tiled encoders_stream_fp8_tiled all_nf4_wo
  all_nf4_wo_tiled prompt_apart t5_nf4_stored encoders_stream_nf4 t5_int8_tiled transformer_nf4 layerwise_casting
  vae_tiling without_t5 group_offload_stream_tiled group_offload_stream sequential_offload}
SPEED=${SPEED:-eager cudnn_attention flash_attention compiled_blocks fp8_compiled best_fp8 int8_compiled best mag_cache
  channels_last half_guidance attention_broadcast fused_qkv bfloat16 cuda_graphs compiled_plainly compiled}
mkdir -p "$OUT"
"$PYTHON" - <<'P' || exit 1
import sys, torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "There is no CUDA device here.")
sys.exit(not torch.cuda.is_available())
P
began=$SECONDS
told() { echo "== $1, $((SECONDS - began)) s after the start"; }

tests() {
  local code
  timeout "${TESTS:-240}" "$PYTHON" -m pytest -n logical --maxprocesses 8 --dist loadgroup -q -rfE --tb=line \
    -p no:cacheprovider --ignore tests/explore/test_browser.py --ignore tests/test_site.py \
    --ignore tests/test_notebooks.py >"$OUT/tests.txt" 2>&1
  code=$?
  grep -E "^(FAILED|ERROR)|passed|failed" "$OUT/tests.txt" | cut -c1-200
  return $code
}

records() {
  local study rows code=0 seconds=$((${RECORDS:-420} / 2))
  for study in memory speed; do
    [ -e "$OUT/$study.jsonl" ] || cp "sd3kit/results/$study.jsonl" "$OUT/"  # rows that this machine has are left
    rows=$([ $study = memory ] && echo "$MEMORY" || echo "$SPEED")
    # shellcheck disable=SC2086
    timeout -s INT -k 20 "$seconds" "$PYTHON" -m studies.measure $study --model "$MODEL" --weights random --steps 20 \
      --calls 3 --warmup 1 --out "$OUT/$study.jsonl" --rows $rows 2>&1 | tee "$OUT/$study.txt" | grep -v "row/s\|s/row"
    [ "${PIPESTATUS[0]}" = 0 ] || code=1
  done
  return $code
}

lessons() {
  timeout -s INT -k 20 "${LESSONS:-180}" "$PYTHON" tests/lessons.py --survey "$OUT/lessons"
}

[ $# -gt 0 ] || set -- tests records lessons
for one in "$@"; do
  case $one in tests | records | lessons) ;; *) echo "There is no part $one: tests, records or lessons." >&2; exit 2 ;; esac
done
failed=
for one in "$@"; do
  "$one" || failed+=" $one"
  told "$one"
done
[ -z "$failed" ] || { echo "Failed, or not done in the time:$failed; look at $OUT." >&2; exit 1; }
