"""The judge: stages that a candidate passes before it is timed, and a gate for tasks."""
