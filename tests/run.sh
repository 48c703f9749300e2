# Runs the suite under both backends side by side, one thread each.
set -u
log=$(mktemp)
export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
    TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1
KERAS_BACKEND=jax "$BIN/python" -m pytest -q --durations=20 "$@" >"$log" 2>&1 &
jax=$!
KERAS_BACKEND=tensorflow \
    "$BIN/python" -m pytest -q --durations=20 "$@"
tensorflow_status=$?
wait $jax
jax_status=$?
echo "== KERAS_BACKEND=jax"
cat "$log"
rm -f "$log"
echo "tensorflow: exit $tensorflow_status, jax: exit $jax_status"
exit $((tensorflow_status + jax_status))
