# Sourced by the sbatch files. Runs a script of the project through srun with the project's own Python (PYTHON, else
# .venv/bin/python, else python). On USR2, which Slurm sends before it takes the node away, the script is told to finish its
# batch or epoch, and the job goes back to the queue, to run the same command again.
run_and_requeue() {
    local python=${PYTHON:-}
    [[ -n $python ]] || python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)
    srun --kill-on-bad-exit=1 "$python" -u "$@" &
    local step=$! told=0 code
    trap 'told=1; kill -USR2 "$step"' USR2  # srun passes the signal on to its tasks
    while :; do
        wait "$step"
        code=$?
        # A trap interrupts wait: only when the step is gone is its exit code the script's.
        kill -0 "$step" 2>/dev/null || break
    done
    if ((told && code != 0)); then
        echo "interrupted; back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$code"
}
