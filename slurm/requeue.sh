# Sourced by the sbatch files. Runs a script of the project through srun with the project's own Python (PYTHON, else
# .venv/bin/python, else python). On USR2, which Slurm sends before it takes the node away, the script is told to finish its
# batch or epoch, and the job goes back to the queue, to run the same command again. A batch that takes longer than GRACE
# seconds (90 of the 120 that `#SBATCH --signal` gives) is cut off, so that the job is requeued in any case and draws it anew.
run_and_requeue() {
    local python=${PYTHON:-}
    [[ -n $python ]] || python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)
    # srun has not inherited --cpus-per-task since Slurm 22.05: a task would get one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    srun --kill-on-bad-exit=1 "$python" -u "$@" &
    local step=$! deadline=0 code
    trap 'deadline=$((SECONDS + ${GRACE:-90})); kill -USR2 "$step"' USR2  # srun passes the signal on to its tasks
    while :; do
        if ((deadline == 0)); then
            wait "$step"
        else
            while kill -0 "$step" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.5; done
            kill -0 "$step" 2>/dev/null && { code=75; break; }
            wait "$step"
        fi
        code=$?
        # A trap interrupts wait: only when the step is gone is its exit code the script's.
        kill -0 "$step" 2>/dev/null || break
    done
    # 75: the script was stopped in any other way, and the same command resumes.
    if ((code != 0 && (deadline > 0 || code == 75))); then
        echo "interrupted; back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$code"
}
