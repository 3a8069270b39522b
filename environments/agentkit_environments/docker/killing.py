"""A script that kills one command, using only the built-in commands of /bin/sh."""

from __future__ import annotations

# Kill the processes that carry the cookie "$1" in their environment, and their descendants and sessions. The script
# stops all of them before it kills any, so that none can escape by forking. Only a process's own user can read its
# environment, so the script runs as the command's user and a command can resist it. The keeper handles that case.
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
