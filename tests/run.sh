# Runs the suite under both backends, two processes at a time, one thread each.
# Each backend's tests are two jobs, and the bert4keras room, TensorFlow's alone,
# is one more, so that both processes have work to the end. PYTEST_ADDOPTS takes
# options for all of them.
set -u
export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
    TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1
jobs='tensorflow-1 tensorflow-2 jax-1 jax-2 bert4keras'
first='tests/adversarial tests/conformance tests/denoising tests/documentation
    tests/hall tests/hsic'

if [ $# = 0 ]; then
    logs=$(mktemp -d)
    export logs
    # shellcheck disable=SC2086
    printf '%s\n' $jobs | xargs -n 1 -P 2 sh "$0"
    for job in $jobs; do
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
job=$1
case $job in
bert4keras) backend=tensorflow tests=tests/bert4keras ;;
*-1) backend=${job%-1} tests=$first ;;
*-2)
    backend=${job%-2} tests=--ignore=tests/bert4keras
    for folder in $first; do
        tests="$tests --ignore=$folder"
    done
    ;;
esac
export KERAS_BACKEND="$backend"
# shellcheck disable=SC2086
"$BIN/python" -m pytest -q --durations=20 $tests >"$logs/$job" 2>&1
status=$?
# 5: the options chose no test.
[ $status = 0 ] || [ $status = 5 ] || echo "$job" >"$logs/$job.failed"
tail -n 1 "$logs/$job" | sed "s/^/$job: /"
