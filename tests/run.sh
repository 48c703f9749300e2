# Runs the suite under both backends, two processes at a time, one thread each.
# The bert4keras room is TensorFlow's alone: its tests are a third job, for
# whichever process is free first. PYTEST_ADDOPTS takes options for all of them.
set -u
export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
    TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1

if [ $# = 0 ]; then
    logs=$(mktemp -d)
    export logs
    printf '%s\n' tensorflow jax bert4keras | xargs -n 1 -P 2 sh "$0"
    for job in tensorflow jax bert4keras; do
        echo "== $job"
        cat "$logs/$job"
    done
    failed=$(cat "$logs"/*.failed 2>/dev/null)
    rm -rf "$logs"
    echo "failed: ${failed:-none}"
    [ -z "$failed" ]
    exit
fi

# One job, called by the above.
case $1 in
bert4keras) set -- "$1" tensorflow tests/bert4keras ;;
*) set -- "$1" "$1" --ignore=tests/bert4keras ;;
esac
job=$1
export KERAS_BACKEND="$2"
shift 2
"$BIN/python" -m pytest -q --durations=20 "$@" >"$logs/$job" 2>&1
status=$?
# 5: the options chose no test.
[ $status = 0 ] || [ $status = 5 ] || echo "$job" >"$logs/$job.failed"
tail -n 1 "$logs/$job" | sed "s/^/$job: /"
