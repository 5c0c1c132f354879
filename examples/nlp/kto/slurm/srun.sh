#!/bin/bash
# srun for the ranks of a run, which ends those that are left some time after one of them has failed:
#
#   bash srun.sh <options of srun> <command>
#
# Ranks that have met do so themselves, within seconds, and mostly also before. Those of a rank that cannot tell them, as it was
# killed or its node lacks PyTorch, would wait for it for ten minutes. srun's own --kill-on-bad-exit makes no difference between a failure and a stop
# (75), and sends the others TERM, which they answer as a stop. The exit code is srun's; of ranks that were ended here, that of
# the one that had failed.

set -o pipefail

FAILURE_GRACE=${FAILURE_GRACE:-60}   # seconds after a failure in which the others should have ended

failure='^srun: error: .*: (tasks? [^:]*): (.*)$'   # srun: error: node1: task 8: Exited with exit code 1

# Pass on what srun, whose process id comes first, and the ranks write to stderr.
watch() {
    local srun line who code=137 timer=
    trap '' INT  # Ctrl-C is for srun
    read -r srun
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line" >&2
        [[ -z $timer && $line =~ $failure && ${BASH_REMATCH[2]} != "Exited with exit code 75" ]] || continue
        who="${BASH_REMATCH[1]}: ${BASH_REMATCH[2]}"
        [[ $who == *" exit code "* ]] && code=${who##* }
        (
            read -rt "$FAILURE_GRACE" _ <> <(:)   # waits, without a process that would have to be ended
            trap '' TERM                          # the others' end is now this one's doing
            echo "error: the others have not ended within $FAILURE_GRACE s of a failure ($who) and are killed" >&2
            kill -TERM "$srun"                    # srun takes that for: kill them all
        ) &
        timer=$!
    done
    [ -n "$timer" ] || return 0
    kill -TERM "$timer" 2> /dev/null
    wait "$timer" 2> /dev/null && return "$code"
    return 0
}

exec 3>&1   # stdout is left alone
# what a site has set for the two options would end ranks that still have something to do
{ echo "$BASHPID" >&2; exec srun --kill-on-bad-exit=0 --wait=0 "$@"; } 2>&1 >&3 3>&- | watch
