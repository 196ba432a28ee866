//! Flags, sizes, names, configuration files, and a daemon that is not there.

use super::{CONFLICT, Good, NO_AGENT, NOT_FOUND, Scratch, USAGE, ballast, line};

#[test]
fn unknown_and_missing_words_are_refused() {
    line("frobnicate").refused(USAGE, &["frobnicate"]);
    line("status --frob").refused(USAGE, &["--frob"]);
    line("vdi create x").refused(USAGE, &[]);
    line("vdi create x --size 0").refused(USAGE, &["--size", "size of 0"]);
    line("vdi create x --size much").refused(USAGE, &["'much'", "GiB"]);
    line("store format file:/nowhere/x --size 0").refused(USAGE, &["size of 0"]);
    line("agent").refused(USAGE, &["--store"]);
    line("agent --store file:/x").refused(USAGE, &["--cache"]);
    line("agent --store file:/x --cache /a --cache /b --cache /c")
        .refused(USAGE, &["/a", "/c", "one or two"]);
    line("agent --store file:/x --cache /a --socket-mode 888").refused(USAGE, &["888", "octal"]);
    line("agent --store file:/x --cache /a --socket-owner nobody-here:0")
        .refused(USAGE, &["nobody-here"]);
    line("agent --store file:/x --cache /a --log =!").refused(USAGE, &["log filter"]);
    // Of a later version, not a stub.
    line("host list").refused(USAGE, &["host"]);
}

#[test]
fn help_tells_the_exit_codes() {
    let help = line("--help");
    for word in ["Exit codes", "vdi", "store", "cache", "status", "--json", "--run-dir"] {
        assert!(help.done().contains(word), "{word}");
    }
    line("--version").done();
}

#[test]
fn a_configuration_file_is_taken_at_its_word() {
    let scratch = Scratch::new();
    let file = scratch.path("ballast.toml");
    let refused = |text: &str, words: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let mut words = words.to_vec();
        words.push("ballast.toml");
        ballast(["agent", "--config", &file]).refused(USAGE, &words);
    };
    refused("store = \"file:/x\"\n[cache]\npath = \"/y\"\n", &["line 3", "`path`", "`paths`"]);
    refused("stores = 1\n", &["line 1", "`stores`", "`store`"]);
    refused("[cache]\nsize = \"0\"\n", &["line 2", "size of 0"]);
    refused("store = file:/x\n", &["line 1"]);
    ballast(["agent", "--config", &scratch.path("none.toml")]).refused(USAGE, &["none.toml"]);
}

#[test]
fn without_an_agent_commands_say_so() {
    let scratch = Scratch::new();
    let run = scratch.path("run");
    for command in ["status", "vdi list", "vdi attach x", "cache drain", "cache status"] {
        let words = ["--run-dir", &run].into_iter().chain(command.split(' '));
        ballast(words).refused(NO_AGENT, &["no agent is running", &run, "ballast agent"]);
    }
    let said = ballast(["--run-dir", &run, "status", "--json"]);
    let error: serde_json::Value = serde_json::from_str(&said.stderr).unwrap();
    assert_eq!((said.code, said.stdout.as_str()), (Some(NO_AGENT), ""));
    assert_eq!(error["error"]["kind"], "agent_unreachable");
    assert!(error["error"]["message"].as_str().unwrap().contains(&run));
    let said = line("vdi create x --size 0 --json");
    let error: serde_json::Value = serde_json::from_str(&said.stderr).unwrap();
    assert_eq!((said.code, &error["error"]["kind"]), (Some(USAGE), &"usage".into()));
}

#[test]
fn bad_names_and_sizes_are_refused_and_harm_nothing() {
    let mut good = Good::start();
    let long = "x".repeat(300);
    for (name, word) in [
        ("a/b", "'a/b'"),
        ("../../etc/passwd", "passwd"),
        ("..", "'..'"),
        ("", "empty"),
        ("a@b", "'a@b'"),
        ("a\nb", "control character"),
        (long.as_str(), "300 bytes"),
        ("00000000-0000-0000-0000-000000000001", "UUID"),
    ] {
        good.ask(&["vdi", "create", name, "--size", "1GiB"]).refused(USAGE, &[word]);
    }
    good.ask(&["vdi", "create", "x", "--size", "4097"]).refused(USAGE, &["'x'", "4097", "8192"]);
    good.ask(&["vdi", "create", "x", "--size", "300TiB"]).refused(USAGE, &["'x'", "256 TiB"]);
    good.ask(&["vdi", "create", "disk-1", "--size", "1GiB"])
        .refused(CONFLICT, &["'disk-1'", "taken"]);
    good.ask(&["vdi", "resize", "disk-1", "--size", "1MiB"])
        .refused(USAGE, &["disk-1", "shrinking"]);
    good.ask(&["vdi", "delete", "disk-1"]).refused(CONFLICT, &["'disk-1'", "attached", "detach"]);
    good.ask(&["vdi", "detach", "disk-1"])
        .refused(CONFLICT, &["'disk-1'", "virtual machine", "--force"]);
    for action in ["info", "attach", "detach", "delete"] {
        good.ask(&["vdi", action, "nix"]).refused(NOT_FOUND, &["'nix'", "ballast vdi list"]);
        good.ask(&["vdi", action, "a/../b"]).refused(NOT_FOUND, &["'a/../b'"]);
        good.ask(&["vdi", action, &long]).refused(NOT_FOUND, &["xxx"]);
        good.ask(&["vdi", action, ""]).refused(USAGE, &["empty"]);
    }
    good.ask(&["cache", "drain", "nix"]).refused(NOT_FOUND, &["'nix'"]);
    let list = good.ask(&["vdi", "list", "--json"]).json();
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    good.assert_unharmed();
}
