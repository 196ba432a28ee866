//! `make demo`: a guest's disk survives a kill -9 of the agent. See `tests::demo`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::demo::main()
}
