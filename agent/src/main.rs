//! The `ballast` program; see the library for what it does.

fn main() -> std::process::ExitCode {
    agent::run()
}
