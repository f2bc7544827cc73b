#!/usr/bin/env bash
# Restart a launcher after a transient fault: a rank or a machine died or hung.
#
#   bash launch/restart_loop.sh RUN/STAGE deepspeed --hostfile hosts launch/pretrain.py --config my.yaml --resume auto
#
# The launchers' exit codes do not show the cause; the last record of RUN/STAGE/events.jsonl does. It is not restarted
# after its end (0), a requested stop (75), or errors of config, data, checkpoint or loss (2 to 5). At most
# BIGDSSM_MAX_RESTARTS (default 10) restarts.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
events=$1/events.jsonl
shift
for ((restart = 0; restart <= ${BIGDSSM_MAX_RESTARTS:-10}; restart++)); do
    lines=$(cat "$events" 2>/dev/null | wc -l)
    "$@"
    code=$?
    if [ "$(cat "$events" 2>/dev/null | wc -l)" -eq "$lines" ]; then # it did not start
        [ "$restart" -gt 0 ] || exit $code
        sleep "${BIGDSSM_RESTART_WAIT_S:-30}" # a machine may still be down
        continue
    fi
    last=$(tail -n 1 "$events")
    case $last in
    *'"exit_code": 6,'*) ;;
    *'"exit_code": '*) exit $code ;;
    esac # without a code: killed
    echo "restart_loop: ended by a fault ($last)" >&2
done
echo "restart_loop: ${BIGDSSM_MAX_RESTARTS:-10} restarts; not started again" >&2
exit 6
