//! Goal: the forest is drawn whole and in order whatever the store says, and what names hold does not break the drawing.

use super::*;
use crate::api::VdiState;
use crate::api::tree::TreeOrigin;

fn disk(n: u128, name: &str, snapshots: u64, origin: Option<(u128, u64, &str)>) -> TreeDisk {
    TreeDisk {
        name: name.into(),
        uuid: Uuid::from_u128(n),
        size: 1 << 30,
        state: VdiState::Detached,
        owner: None,
        snapshots,
        origin: origin.map(|(n, lsn, label)| TreeOrigin {
            uuid: Uuid::from_u128(n),
            lsn,
            label: Some(label.into()),
        }),
        sizes: None,
    }
}

/// Two clones of one snapshot, one of another, a clone of a clone, and a disk that stands alone.
fn forest() -> Forest {
    let mut running = disk(2, "web-1", 1, Some((1, 20, "v2")));
    (running.state, running.owner) = (VdiState::Running, Some("host-a".into()));
    let disks = vec![
        disk(5, "alone", 0, None),
        disk(1, "golden", 9, None),
        disk(4, "test", 0, Some((2, 7, ""))),
        running,
        disk(3, "web-2", 3, Some((1, 20, "v2"))),
        disk(6, "web-old", 0, Some((1, 4, "v1"))),
    ];
    Forest { disks, store: None }
}

#[test]
fn the_text_shows_what_hangs_on_what() {
    let expected = "\
alone  1.0 GiB, detached
golden  1.0 GiB, detached
├─ @4 'v1'
│  └─ web-old  1.0 GiB, detached
├─ @20 'v2'
│  ├─ web-1  1.0 GiB, running on host-a
│  │  └─ @7
│  │     └─ test  1.0 GiB, detached
│  └─ web-2  1.0 GiB, detached
│     └─ 3 snapshots without clones
└─ 7 snapshots without clones
";
    assert_eq!(text::draw(&lines(&forest())), expected);
    assert_eq!(text::draw(&lines(&Forest::default())), "");
}

#[test]
fn every_disk_is_drawn_once_even_if_its_origin_makes_no_sense() {
    let disks = vec![
        disk(1, "a", 0, Some((2, 1, "x"))),
        disk(2, "b", 0, Some((1, 1, "x"))),
        disk(3, "c", 1, Some((99, 1, "x"))),
        disk(4, "d", 0, Some((4, 1, "x"))),
    ];
    let forest = Forest { disks, store: None };
    let lines = lines(&forest);
    let mut names: Vec<&str> = lines
        .iter()
        .filter_map(|line| match line.what {
            What::Disk(disk) => Some(disk.name.as_str()),
            _ => None,
        })
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b", "c", "d"]);
    for line in &lines {
        assert!(line.parent.is_none_or(|parent| lines[parent].depth + 1 == line.depth));
    }
}

/// A clone of a clone of a clone, for ever.
#[test]
fn a_deep_chain_is_drawn_without_recursion() {
    let chain = (1..5000).map(|n| disk(n, &format!("d{n}"), 1, Some((n - 1, 1, ""))));
    let disks: Vec<_> = [disk(0, "d0", 1, None)].into_iter().chain(chain).collect();
    let forest = Forest { disks, store: None };
    let lines = lines(&forest);
    assert_eq!(lines.len(), 2 * 4999 + 2);
    assert!(text::draw(&lines).len() < 2 << 20);
    assert!(dot::draw(&lines).contains("d4999"));
}

#[test]
fn names_and_labels_are_quoted() {
    let odd = "a\"b\\c<d>&";
    let disks = vec![disk(1, odd, 1, None), disk(2, "clone", 0, Some((1, 3, odd)))];
    let forest = Forest { disks, store: None };
    let lines = lines(&forest);
    let dot = dot::draw(&lines);
    assert!(dot.contains(r#"label="a\"b\\c<d>&  1.0 GiB, detached"];"#), "{dot}");
    assert!(dot.contains("n0 -> n1;\n") && dot.contains("n1 -> n2;\n") && dot.ends_with("}\n"));
    let svg = svg::draw(&lines);
    assert!(svg.contains("@3 'a\"b\\c&lt;d&gt;&amp;'</text>"), "{svg}");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("<d>"));
    assert_eq!(svg.matches("<path ").count(), 2);
}

#[test]
fn sizes_stand_in_every_drawing() {
    use blockstore::types::Lsn;
    use gc::sizes::{Amount, SnapshotSizes, StoreSizes};
    let amount = |data| Amount { data, metadata: 0 };
    let root = |referenced, exclusive| RootSizes {
        referenced: amount(referenced),
        exclusive: amount(exclusive),
    };
    let mut forest = forest();
    let snapshot = SnapshotSizes { lsn: Lsn(20), cloned: true, sizes: root(4096, 1024) };
    let sizes = DiskSizes {
        uuid: Uuid::from_u128(1),
        sizes: root(8192, 2048),
        snapshots_free: amount(512),
        deletion_frees: amount(3072),
        lists: amount(0),
        snapshots: vec![snapshot],
    };
    let unknown = DiskSizes { uuid: Uuid::from_u128(77), ..sizes.clone() };
    let store = StoreSizes { capacity: 1 << 30, provisioned: 3 << 30, ..StoreSizes::default() };
    let report = SizesReport { disks: vec![unknown, sizes], store, ..SizesReport::default() };
    add_sizes(&mut forest, report);
    let lines = lines(&forest);
    let (text, dot, svg) = (text::draw(&lines), dot::draw(&lines), svg::draw(&lines));
    for drawing in [&text, &dot, &svg] {
        for words in [
            "detached; holds 8.0 KiB: 6.0 KiB shared, 2.0 KiB exclusive; deletion frees 3.0 KiB",
            "@20 'v2'; holds 4.0 KiB: 3.0 KiB shared, 1.0 KiB exclusive",
            "7 snapshots without clones; deletion frees 512 B",
        ] {
            assert!(drawing.contains(words), "'{words}' is not in\n{drawing}");
        }
    }
    assert!(text.contains("@4 'v1'\n"), "nothing is made up for what was not told:\n{text}");
    assert!(below_forest(&store).contains("3.00: disks of 3.0 GiB"), "{}", below_forest(&store));
}
