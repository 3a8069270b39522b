#!/bin/sh
# Prepare the Docker backend on a fresh Debian or Ubuntu machine, as root: install the engine, start it (without systemd)
# and build the base image. Skips each step that is already done.
set -eu

here=$(dirname "$(readlink -f "$0")")
python=${PYTHON:-python3}
tag=agentkit-base:latest
log=${DOCKERD_LOG:-/tmp/dockerd.log}

if [ "$(id -u)" -ne 0 ]; then
    echo "ci-docker.sh: run this script as root; without it the Docker tests are skipped" >&2
    exit 1
fi

if ! command -v dockerd >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io iptables >/dev/null
fi

if ! docker version >/dev/null 2>&1; then
    # A killed engine leaves a pid file that prevents the next one from starting.
    if [ -f /var/run/docker.pid ] && ! kill -0 "$(cat /var/run/docker.pid)" 2>/dev/null; then
        rm -f /var/run/docker.pid
    fi
    setsid dockerd >"$log" 2>&1 </dev/null &
    tries=0
    until docker version >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ "$tries" -ge 60 ]; then
            echo "ci-docker.sh: dockerd did not respond within 60 s; the end of $log:" >&2
            tail -n 20 "$log" >&2
            exit 1
        fi
        sleep 1
    done
fi

if ! docker image inspect "$tag" >/dev/null 2>&1; then
    "$python" "$here/../agentkit_environments/images/base.py" --source "${BASE_SOURCE:-host}" --tag "$tag"
fi
