# Builds the sdist and the wheel into dist/, checks both, and tries them as a
# stranger would: the wheel in empty environments, where the basic examples run
# outside of the repository; the sdist by tests of its own.
# TRY chooses among 3.11, 3.12, 3.13, jax (without TensorFlow) and sdist.
# PYTHON311, PYTHON312 and PYTHON313 name interpreters that are not on the path;
# what is missing is skipped, aloud.
set -eu
here=$(pwd)
venvs=$here/${VENV:-.venv-release}
bert4keras=bert4keras==0.11.5
export TF_CPP_MIN_LOG_LEVEL=3

"${PYTHON:-python3}" -m venv "$venvs/build"
"$venvs/build/bin/pip" install -q build twine
rm -rf dist build
"$venvs/build/bin/python" -m build --outdir dist . >"$venvs/build.log" 2>&1 || {
    cat "$venvs/build.log"
    exit 1
}
"$venvs/build/bin/twine" check --strict dist/*
wheel=$(ls "$here"/dist/*.whl)
sdist=$(ls "$here"/dist/*.tar.gz)

empty() { # name, interpreter: an environment and a folder with nothing in them
    rm -rf "${venvs:?}/$1"
    "$2" -m venv "$venvs/$1"
    folder=$(mktemp -d)
    bin=$venvs/$1/bin
}

basic() { # runs the copied basic examples, but those named
    cp "$here"/examples/basic_*.py "$folder"
    for name in "$@"; do rm "$folder/$name"; done
    for example in "$folder"/basic_*.py; do
        name=$(basename "$example")
        case $name in # as tests/documentation/test_examples.py shortens them
        basic_nvae.py) options="--steps 2 --samples 2" ;;
        basic_denoising_density.py) options="--steps 200" ;;
        basic_electra.py) options="--steps 50" ;;
        basic_virtual*.py) options="--epochs 10" ;;
        basic_finite*.py | basic_residual*.py) options="--epochs 1" ;;
        *) options= ;;
        esac
        # shellcheck disable=SC2086
        (cd "$folder" && "$bin/python" "$name" $options >log 2>&1) || {
            cat "$folder/log"
            echo "failed: $name"
            exit 1
        }
        echo "   $name"
    done
    rm -rf "$folder"
}

on_python() { # version, interpreter
    if ! "$2" -c '' 2>/dev/null; then
        echo "== $1: skipped, no $2"
        return
    fi
    echo "== $1: the wheel with TensorFlow"
    empty "$1" "$2"
    "$bin/pip" install -q "$wheel[examples]"
    "$bin/pip" install -q --no-deps "$bert4keras"
    basic
}

for one in ${TRY:-3.11 3.12 3.13 jax sdist}; do
    case $one in
    3.11) on_python 3.11 "${PYTHON311:-python3.11}" ;;
    3.12) on_python 3.12 "${PYTHON312:-python3.12}" ;;
    3.13) on_python 3.13 "${PYTHON313:-python3.13}" ;;
    jax)
        echo "== jax: the wheel without TensorFlow, as README has it"
        empty jax "${PYTHON:-python3}"
        "$bin/pip" install -q keras numpy pot jax
        "$bin/pip" install -q --no-deps "$wheel"
        "$bin/pip" install -q matplotlib rich scikit-learn
        du -sm "$venvs/jax" | sed 's/\t.*/ MB/'
        # bert4keras is TensorFlow's; XLA takes minutes for NVAE on a CPU.
        KERAS_BACKEND=jax basic basic_bert4keras.py basic_nvae.py
        ;;
    sdist)
        echo "== sdist: its own tests"
        empty sdist "${PYTHON:-python3}"
        tar -xzf "$sdist" -C "$folder" --strip-components=1
        "$bin/pip" install -q "$folder[test]"
        "$bin/pip" install -q --no-deps "$bert4keras"
        (cd "$folder" && "$bin/python" -m pytest -q \
            tests/documentation tests/hall/test_extras.py tests/hsic)
        rm -rf "$folder"
        ;;
    esac
done
