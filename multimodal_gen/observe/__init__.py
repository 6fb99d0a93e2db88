"""What operators see of a running server: status lines, gauges, CPU time, stacks of what is stuck. No torch."""
