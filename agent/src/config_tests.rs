//! Flags over file over defaults; whatever is wrong is named.

use super::*;

fn load(args: AgentArgs, text: &str) -> Result<AgentConfig> {
    merge(args, parse_file(text)?, None)
}

fn minimal() -> AgentArgs {
    AgentArgs {
        store: Some("file:/store".into()),
        cache: vec!["/cache".into()],
        ..AgentArgs::default()
    }
}

const FULL: &str = r#"
    store = "file:/from-file"
    run_dir = "/run/from-file"
    log = "debug"
    chap_file = "/chap"
    store_wait = "1m"
    shutdown_timeout = 3
    [cache]
    paths = ["/cache-from-file"]
    size = "2GiB"
    leg_timeout = "20s"
    [sockets]
    mode = "0660"
    owner = "0:0"
    [disks]
    queues = 2
    queue_size = 256
    poll_us = 50
    [memory]
    nodes = "8MiB"
    segments = 16777216
    [flush]
    max_age = "500ms"
    [gc]
    free_below = 10
    every = "1h"
    rate = "1MiB"
    unmap = false
    unmap_rate = "1GiB"
    memory = "16MiB"
    [scrub]
    every = "7d"
    rate = "4MiB"
    [space]
    warn_used = [85, 70]
    [metrics]
    listen = "127.0.0.1:9477"
"#;

#[test]
fn a_file_alone_is_enough() {
    let config = load(AgentArgs::default(), FULL).unwrap();
    let expected = AgentConfig {
        store: "file:/from-file".into(),
        device: DeviceArgs { chap_file: Some("/chap".into()), initiator_name: None },
        cache: "/cache-from-file".into(),
        cache_twin: None,
        degraded: false,
        machine_id_file: "/etc/machine-id".into(),
        leg_timeout: Duration::from_secs(20),
        cache_size: Some(2 << 30),
        run_dir: "/run/from-file".into(),
        log: "debug".into(),
        take_over_host: None,
        store_wait: Duration::from_secs(60),
        shutdown_timeout: Duration::from_secs(3),
        socket_mode: 0o660,
        socket_owner: (Some(0), Some(0)),
        queues: 2,
        queue_size: 256,
        poll_us: 50,
        node_memory: 8 << 20,
        segment_memory: 16 << 20,
        flush_max_age: Some(Duration::from_millis(500)),
        gc: Schedule { free_below: 10, every: Some(Duration::from_secs(3600)) },
        gc_rate: 1 << 20,
        gc_unmap: false,
        gc_unmap_rate: 1 << 30,
        gc_memory: 16 << 20,
        scrub: ScrubSchedule { every: Some(7 * Duration::from_secs(24 * 3600)) },
        scrub_rate: 4 << 20,
        warn_used: vec![70, 85],
        metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 9477))),
    };
    assert_eq!(config, expected);
}

#[test]
fn flags_win() {
    let args = AgentArgs { cache_size: Some(1 << 20), queues: Some(8), ..minimal() };
    let file = parse_file(FULL).unwrap();
    let config = merge(args, file, Some("/run/flag".into())).unwrap();
    assert_eq!((config.store.as_str(), config.cache.to_str()), ("file:/store", Some("/cache")));
    assert_eq!((config.cache_size, config.queues), (Some(1 << 20), 8));
    assert_eq!(config.run_dir, Path::new("/run/flag"));
}

#[test]
fn flags_alone_are_enough_and_defaults_are_safe() {
    let config = load(minimal(), "").unwrap();
    assert_eq!((config.run_dir.as_path(), config.socket_mode), (Path::new(RUN_DIR_DEFAULT), 0o600));
    assert_eq!((config.socket_owner, config.poll_us), ((None, None), 0));
    let day = Duration::from_secs(24 * 3600);
    assert_eq!(config.gc, Schedule { free_below: 20, every: Some(day) });
    assert_eq!((config.gc_unmap, config.gc_unmap_rate), (true, 512 << 20));
    let never = AgentArgs { gc_every: Some(Duration::ZERO), gc_free_below: Some(0), ..minimal() };
    assert_eq!(load(never, "").unwrap().gc, Schedule { free_below: 0, every: None });
    assert_eq!(config.scrub, ScrubSchedule { every: Some(30 * day) });
    assert_eq!(config.scrub_rate, 16 << 20);
    let never = "[scrub]\nevery = \"never\"\nrate = 0\n";
    assert_eq!(load(minimal(), never).unwrap().scrub, ScrubSchedule { every: None });
    refused(minimal(), "[scrub]\nevery = \"often\"\n", &["often", "never"]);
    refused(minimal(), "[gc]\nfree_below = 101\n", &["gc.free_below", "101"]);
    refused(minimal(), "[gc]\nmemory = 4096\n", &["gc.memory", "4096"]);
    assert_eq!(config.warn_used, [80, 90, 95]);
    let marks = AgentArgs { warn_used: Some(vec![95, 50, 95]), ..minimal() };
    assert_eq!(load(marks, "").unwrap().warn_used, [50, 95]);
    assert!(load(minimal(), "[space]\nwarn_used = []\n").unwrap().warn_used.is_empty());
    refused(minimal(), "[space]\nwarn_used = [80, 101]\n", &["space.warn_used", "101"]);
}

#[track_caller]
fn refused(args: AgentArgs, text: &str, words: &[&str]) {
    let failure = load(args, text).unwrap_err();
    assert_eq!(failure.kind, Kind::Usage);
    for word in words {
        assert!(failure.message.contains(word), "'{word}' is not in: {failure}");
    }
    assert!(!failure.message.contains('\n'), "one line: {failure}");
}

#[test]
fn what_is_wrong_in_a_file_is_named_with_its_line() {
    refused(minimal(), "store = \"file:/x\"\nstroe = 1\n", &["line 2", "unknown key `stroe`"]);
    refused(minimal(), "[cache]\nsiez = 1\n", &["line 2", "unknown key `siez`", "size"]);
    refused(minimal(), "[cache]\nsize = \"0\"\n", &["line 2", "size of 0"]);
    refused(minimal(), "[sockets]\nmode = \"0999\"\n", &["line 2", "0999", "octal"]);
    refused(minimal(), "[sockets]\nmode = 660\n", &["line 2"]);
    refused(minimal(), "store_wait = \"soon\"\n", &["line 1", "'soon'", "duration"]);
    refused(minimal(), "store = \n", &["line 1"]);
    refused(minimal(), "[disks]\nqueues = 0\n", &["disks.queues", "0"]);
    refused(minimal(), "[disks]\nqueue_size = 100\n", &["disks.queue_size", "100", "power of two"]);
}

#[test]
fn what_is_missing_or_not_possible_is_named() {
    refused(AgentArgs { store: None, ..minimal() }, "", &["--store"]);
    refused(AgentArgs { cache: vec![], ..minimal() }, "", &["--cache", "[cache]"]);
    let three = AgentArgs { cache: ["/a", "/b", "/c"].map(Into::into).to_vec(), ..minimal() };
    refused(three, "", &["3 caches", "/a", "/c", "one or two"]);
    let hasty = AgentArgs { leg_timeout: Some(Duration::from_millis(10)), ..minimal() };
    refused(hasty, "", &["leg_timeout", "10ms", "1s"]);
    let owner = AgentArgs { socket_owner: Some("no-such-user:0".into()), ..minimal() };
    refused(owner, "", &["no-such-user", "socket owner"]);
}

#[test]
fn a_cache_has_one_leg_or_two() {
    assert_eq!(load(minimal(), "").unwrap().caches().len(), 1);
    let args = AgentArgs { cache: vec![], degraded: true, ..minimal() };
    let config = load(args, "[cache]\npaths = [\"/a\", \"/b\"]\n").unwrap();
    assert_eq!(config.caches(), [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert!(config.degraded);
}

#[test]
fn owners_by_name_and_number() {
    assert_eq!(resolve_owner("root:root").unwrap(), (Some(0), Some(0)));
    assert_eq!(resolve_owner("12").unwrap(), (Some(12), None));
    assert_eq!(resolve_owner(":7").unwrap(), (None, Some(7)));
}

#[test]
fn a_missing_file_is_named() {
    let args = AgentArgs { config: Some("/no/such/file".into()), ..minimal() };
    assert!(AgentConfig::load(args, None).unwrap_err().message.contains("/no/such/file"));
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(text in ".{0,200}") {
        let _ = load(minimal(), &text);
    }
}

/// The example and the runbook name what there is.
#[test]
fn example_and_runbook_keep_up_with_the_settings() {
    use clap::Args;
    let example = parse_file(include_str!("../../dist/ballast.toml")).unwrap();
    assert_eq!(merge(AgentArgs::default(), example, None).unwrap().socket_mode, 0o660);
    let runbook = include_str!("../../docs/operations.md");
    for argument in AgentArgs::augment_args(clap::Command::new("agent")).get_arguments() {
        let flag = format!("--{}", argument.get_long().unwrap());
        assert!(runbook.contains(&flag), "{flag} is not in docs/operations.md");
    }
}
