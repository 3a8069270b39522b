"""Scripts that kill inside a container, for a /bin/sh of which nothing but its own commands is used."""

from __future__ import annotations

# Kill the processes that carry the cookie "$1" in their environment, and their descendants and sessions. All are
# stopped before any is killed, so that none can fork its way out. Nothing but the shell's own commands is used.
KILL_COMMAND = r"""
cookie=$1; marked=' '
while :; do
  fresh=
  for directory in /proc/[0-9]*; do
    pid=${directory#/proc/}
    case "$marked" in *" $pid "*) continue;; esac
    [ "$pid" = "$$" ] && continue
    { IFS= read -r line <"$directory/stat"; } 2>/dev/null || continue
    set -- ${line##*) }
    [ "$1" = Z ] && continue
    found=
    case "$marked" in *" $2 "*|*" $4 "*) found=1;; esac
    if [ -z "$found" ]; then
      { while IFS= read -r line || [ -n "$line" ]; do
          case "$line" in *"=$cookie"*) found=1; break;; esac
        done <"$directory/environ"; } 2>/dev/null
    fi
    [ -n "$found" ] && kill -STOP "$pid" 2>/dev/null && fresh="$fresh$pid "
  done
  [ -z "$fresh" ] && break
  marked="$marked$fresh"
done
for pid in $marked; do kill -KILL "$pid" 2>/dev/null; done
exit 0
"""

# Kill every process of this user but this shell, until none is left; exit with 1 when some will not die.
KILL_USER = r"""
tries=0
while [ "$tries" -lt 1000 ]; do
  tries=$((tries + 1)); living=
  kill -KILL -1 2>/dev/null
  for directory in /proc/[0-9]*; do
    [ -O "$directory" ] && [ "${directory#/proc/}" != "$$" ] || continue
    { IFS= read -r line <"$directory/stat"; } 2>/dev/null || continue
    case "${line##*) }" in Z*) ;; *) living=1;; esac
  done
  [ -z "$living" ] && exit 0
done
exit 1
"""
