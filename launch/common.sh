# shellcheck shell=bash
# Sourced by the scripts that train on several processes. Options of a launcher and words for `vlmem train` stand on one
# line; this sorts them, prints what a dry run would do, and restarts what failed.

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo "error: needs bash 5.1 or newer, this is $BASH_VERSION (on macOS: brew install bash)" >&2
    exit 2
fi

# Options that take a value, with their defaults, and switches; a script adds its own before it calls read_options.
declare -A option=([config]="" [workdir]="" [stage]="" [profile]="" [cluster-timeout]="" [max-restarts]=3)
declare -A switch=([dry-run]=no)
# The words for `vlmem train`.
declare -a train=()
# Set by a signal: nothing is restarted any more.
stopping=""

say() { echo "${0##*/}: $*" >&2; }

fail() {
    echo "error: $*" >&2
    exit 2
}

# Words as a shell would read them again.
quote() {
    local word line=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    echo "${line:1}"
}

dry() { [ "${switch[dry-run]}" = yes ]; }

# Runs a command; in a dry run prints it.
run() { if dry; then quote "$@"; else "$@"; fi; }

# Fills `option`, `switch` and `train`. Words behind a bare -- go to `vlmem train` as they are.
read_options() {
    local word name value
    while [ $# -gt 0 ]; do
        word=$1 name=${1%%=*}
        shift
        case $name in
            -h | --help)
                usage
                exit 0
                ;;
            --)
                train+=("$@")
                break
                ;;
            --traceback)
                train+=("$word")
                continue
                ;;
            --?*) name=${name#--} ;;
            *) fail "expected an option, got '$word'; --help shows an example" ;;
        esac
        if [ -n "${switch[$name]+set}" ]; then
            [ "$word" = "--$name" ] || fail "--$name takes no value"
            switch[$name]=yes
            continue
        fi
        [ -n "${option[$name]+set}" ] || [[ $name == config.* ]] ||
            fail "there is no option --$name; --help lists them, and words behind -- go to vlmem train unread"
        if [[ $word == *=* ]]; then
            value=${word#*=}
        elif [ $# -gt 0 ] && [[ $1 != --* ]]; then
            value=$1
            shift
        else
            fail "--$name needs a value, as --$name=value or --$name value"
        fi
        case $name in
            config | config.* | workdir | stage | profile | cluster-timeout) train+=("--$name=$value") ;;
        esac
        [[ $name == config.* ]] || option[$name]=$value
    done
    need_number max-restarts 0
}

# need NAME WHAT: --NAME must have been given.
need() { [ -n "${option[$1]}" ] || fail "needs --$1, $2; --help shows an example"; }

need_number() {
    [[ ${option[$1]} =~ ^[0-9]+$ ]] && [ "${option[$1]}" -ge "$2" ] ||
        fail "--$1 must be a whole number of at least $2, got '${option[$1]}'"
}

# What every training needs: a config that is there, and a folder for its results.
need_experiment() {
    need config "the experiment, such as --config configs/comemo_2b.py"
    need workdir "the folder of checkpoints and metrics"
    [ -f "${option[config]%%:*}" ] || fail "there is no file ${option[config]%%:*} (paths count from $PWD)"
}

# export_cache END: the shell line that sets --compile-cache, if it was given.
export_cache() { [ -z "${option[compile-cache]}" ] || echo "export JAX_COMPILATION_CACHE_DIR=$(quote "${option[compile-cache]}")$1"; }

need_command() { dry || command -v "$1" >/dev/null || fail "$1 is not installed: $2"; }

# Files that git knows, as they are now, separated by zero bytes: what travels to other machines.
tracked_files() {
    local file
    git ls-files -z | while IFS= read -r -d '' file; do
        if [ -e "$file" ]; then printf '%s\0' "$file"; fi
    done
}

# The config must travel, too.
need_tracked_config() {
    local file=${option[config]%%:*}
    [[ $file != /* ]] || fail "--config must count from the root of the repository, which is copied; got $file"
    git ls-files --error-unmatch -- "$file" >/dev/null 2>&1 ||
        fail "$file would not be copied, since git does not know it; run: git add $file"
}

# Runs a command until it succeeds, at most --max-restarts times more than once, and not after a signal. Gives its status.
with_restarts() {
    local status restarts=0
    while true; do
        status=0
        "$@" || status=$?
        if [ "$status" -eq 0 ] || [ -n "$stopping" ]; then
            return "$status"
        fi
        if [ "$restarts" -ge "${option[max-restarts]}" ]; then
            say "failed with status $status; not restarted any more (--max-restarts ${option[max-restarts]})"
            return "$status"
        fi
        restarts=$((restarts + 1))
        say "failed with status $status; restart $restarts of ${option[max-restarts]}"
    done
}
