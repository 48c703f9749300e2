# Runs the suite with the lowest versions that setup.py allows, and with the
# newest ones on each Python. PYTHON311, PYTHON312 and PYTHON313 name
# interpreters that are not on the path; what is missing is skipped, aloud.
set -u
failed=0

suite() { # name, interpreter, packages...
    name=$1
    python=$2
    shift 2
    if ! "$python" -c '' 2>/dev/null; then
        echo "== $name: skipped, no $python"
        return
    fi
    echo "== $name"
    venv=.venv-matrix/$name
    "$python" -m venv "$venv" &&
        "$venv/bin/pip" install -q "$@" &&
        "$venv/bin/pip" install -q --no-deps bert4keras==0.11.5 &&
        "$venv/bin/pip" install -q --no-deps -e . &&
        BIN=$venv/bin sh tests/run.sh || failed=1
}

python311=${PYTHON311:-python3.11}
lowest="keras==3.12.0 numpy==1.26.4 pot==0.9.4 tensorflow==2.18.0
    tf_keras==2.18.0 jax==0.4.35 jaxlib==0.4.35"
newest="keras numpy pot tensorflow tf_keras jax keras-hub"
others="pytest hypothesis scipy matplotlib rich safetensors scikit-learn snownlp"
# shellcheck disable=SC2086
{
    suite lowest "$python311" $lowest $others
    suite newest-3.11 "$python311" $newest $others
    suite newest-3.12 "${PYTHON312:-python3.12}" $newest $others
    suite newest-3.13 "${PYTHON313:-python3.13}" $newest $others
}
exit $failed
