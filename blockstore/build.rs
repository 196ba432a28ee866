//! Finds libiscsi for the `iscsi` feature. It is linked dynamically, as its licence (LGPL) suggests.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "iscsi")]
    if let Err(error) = pkg_config::Config::new().atleast_version("1.19").probe("libiscsi") {
        eprintln!("{error}");
        eprintln!(
            "libiscsi 1.19 or newer is needed for iscsi:// stores: install libiscsi-dev and \
             pkg-config (Debian), or build with --no-default-features to go without"
        );
        std::process::exit(1);
    }
}
