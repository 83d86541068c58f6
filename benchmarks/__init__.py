"""One script per figure. Each runs the platform and its peers in one go, prints a table and writes results/NAME.md (learning one a recipe).

    overhead   the steady step against a bare torch loop and Ray Train's DDP
    recovery   the pause after a kill against Ray Train's elastic mode and torchft
    resize     a node's arrival against Ray Train's elastic mode
    growing    a table of more rows than memory holds: speed, memory, disk, and a start on more workers
    native     our step against the same model written natively, for each framework
    hybrid     a step on a mesh against torch's DTensor, FSDP2 and pipelining
    gpu        a GPT of 124 M parameters on one GPU against a plain torch loop; Python, torch and NumPy are enough
    schedules  a pipeline's step against its simulation
    learning   shipped recipes on real data: the last evaluation beside a published figure
"""
